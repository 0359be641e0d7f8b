/*
The end of a segment of attention_decode: its warps' results become one, and where a (sequence, kv
head) pair was cut, the block that has its beginning merges the parts of all, in the order of
positions.

- Within a cluster (cuts that are even), parts are sent into that block's shared memory.
- Else a part's words are messages (message.cuh): who merges waits for them alone.
- The beginning of a pair is the last segment of its block, its other parts are the first of theirs:
  nobody waits long. And nobody waits forever, however few blocks run at once: they start in order,
  and of those that run one at most waits for the part of one that does not.

The code is kept short: it runs once or twice a launch with one warp a scheduler, so its cost is
the number of its dependent instructions.
*/
#pragma once

#include "cluster.cuh"      // defines: peer_address, send_to_peer
#include "common.cuh"       // defines: exp2_fast, pack_bf16, warp_max, warp_sum
#include "decode_tile.cuh"  // defines: Shared, Accumulator, consumers_sync, HEADS, WARPS
#include "message.cuh"      // defines: ask, highest, put, put_back

// A thread ends a segment with four dims of a head, and where these are not all, of another.
constexpr int HEADS_AT_ONCE = CONSUMERS / DIM_QUADS;

// Of a head: four dims of O, not yet divided by the sum.
struct Part {
    float4 o;
    float max, sum;

    __device__ __forceinline__ void clear() {
        o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        max = -INFINITY_F, sum = 0.0f;
    }
    __device__ __forceinline__ void add(float4 x, float scale) {
        o.x += x.x * scale, o.y += x.y * scale, o.z += x.z * scale, o.w += x.w * scale;
    }
    __device__ __forceinline__ void rescale(float new_max) {
        const float alpha = exp2_fast(max - new_max);
        max = new_max, sum *= alpha;
        o.x *= alpha, o.y *= alpha, o.z *= alpha, o.w *= alpha;
    }
    __device__ __forceinline__ void store(bf16* row, int quad) const {
        const float inverse = __fdividef(1.0f, sum);
        ((uint2*)row)[quad] = make_uint2(
            pack_bf16(o.x * inverse, o.y * inverse), pack_bf16(o.z * inverse, o.w * inverse));
    }
};

struct Partials {
    float* base;

    // [8 * HEAD_TILES][HEAD_DIM] of O, then as many pairs (max, sum).
    static constexpr int FLOATS = HEAD_TILES * HEADS * (HEAD_DIM + 2);
    // A block has one segment at most that began before it, and one at most that ends after it.
    __device__ static int slot_of(int first, int split) {
        return 2 * (first + split) + (split == 0 ? 1 : 0);
    }
    __device__ float4* o(int slot, int head) const {
        return (float4*)(base + (uint32_t)(slot * FLOATS + head * HEAD_DIM));
    }
    __device__ float2* max_sum(int slot, int head) const {
        return (float2*)(base + (uint32_t)(slot * FLOATS + HEAD_TILES * HEADS * HEAD_DIM)) + head;
    }
};

#if CLUSTER > 1
// Where the first block of a cluster receives the parts of the others: O, then pairs (max, sum).
struct Received {
    uint8_t* base;  // behind the stages
    int group;
    Shared& shared;

    __device__ float4* o(int split, int head) const {
        return (float4*)base + ((split - 1) * group + head) * DIM_QUADS;
    }
    __device__ float2* max_sum(int split, int head) const {
        return (float2*)o(CLUSTER, 0) + (split - 1) * group + head;
    }
    __device__ uint32_t complete() const { return shared_address(&shared.received); }

    // By a thread of the first block, before parts can have come.
    __device__ void expect(int num_splits) const {
        mbarrier_arrive_expect(complete(), (num_splits - 1) * group * (HEAD_DIM + 2) * 4);
    }
    __device__ void send(const Part& part, int split, int head) const {
        const int quad = threadIdx.x % DIM_QUADS;
        auto at_first = [](uint32_t address) { return peer_address(address, 0); };
        const uint32_t barrier = at_first(complete());
        send_to_peer(at_first(shared_address(o(split, head) + quad)), part.o, barrier);
        if (quad > 0) return;
        send_to_peer(at_first(shared_address(max_sum(split, head))),
                     make_float2(part.max, part.sum), barrier);
    }
    // Adds to the first block's part all others'.
    __device__ void add_to(Part& part, int head, int num_splits) const {
        const int quad = threadIdx.x % DIM_QUADS;
        mbarrier_wait(complete(), 0);
        float2 other[CLUSTER - 1];
        float max = part.max;
#pragma unroll
        for (int i = 0; i < CLUSTER - 1; i++) {
            other[i] = make_float2(-INFINITY_F, 0.0f);
            if (i + 1 < num_splits) other[i] = *max_sum(i + 1, head);
            max = fmaxf(max, other[i].x);
        }
        part.rescale(max);
#pragma unroll
        for (int i = 0; i < CLUSTER - 1; i++) {
            const float weight = exp2_fast(other[i].x - max);
            part.sum += other[i].y * weight;
            if (i + 1 < num_splits) part.add(o(i + 1, head)[quad], weight);
        }
    }
};
#endif

// Adds to a part of split 0 the few others, SPLITS_AT_ONCE of them at once; by whole warps, also where
// lanes have a head that does not exist.
__device__ __forceinline__ void merge_few(
    Part& part, int column, bool exists, const Cut& cut, const Partials& partials) {
    const int quad = threadIdx.x % DIM_QUADS;
#pragma unroll 1
    for (int begin = 1; begin < cut.num_splits; begin += SPLITS_AT_ONCE) {
        float2 max_sum[SPLITS_AT_ONCE];
        float4 o[SPLITS_AT_ONCE];
        auto has = [&](int k) { return exists && begin + k < cut.num_splits; };
        auto slot = [&](int k) { return Partials::slot_of(cut.first, begin + k); };
        uint32_t top;
        do {
#pragma unroll
            for (int k = 0; k < SPLITS_AT_ONCE; k++) {
                max_sum[k] = make_float2(-INFINITY_F, 0.0f);
                o[k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (has(k)) max_sum[k] = ask(partials.max_sum(slot(k), column));
                if (has(k)) o[k] = ask(partials.o(slot(k), column) + quad);
            }
            top = 0;
#pragma unroll
            for (int k = 0; k < SPLITS_AT_ONCE; k++)
                top = max(top, max(highest(max_sum[k]), highest(o[k])));
        } while (top == UNWRITTEN);
        __syncwarp();  // the lanes of a head, all in this warp, have its maximum and sum
#pragma unroll
        for (int k = 0; k < SPLITS_AT_ONCE; k++) {
            if (has(k)) put_back(partials.o(slot(k), column) + quad);
            if (has(k) && quad == 0) put_back(partials.max_sum(slot(k), column));
        }
        float max = part.max;
#pragma unroll
        for (int k = 0; k < SPLITS_AT_ONCE; k++) max = fmaxf(max, max_sum[k].x);
        part.rescale(max);
#pragma unroll
        for (int k = 0; k < SPLITS_AT_ONCE; k++) {
            const float weight = exp2_fast(max_sum[k].x - max);
            part.sum += max_sum[k].y * weight;
            part.add(o[k], weight);
        }
    }
}

// Merges any number of splits, 0 among them. A warp takes whole heads; with one or two heads, part of
// the splits of one. Its lanes weigh 32 splits at a time.
__device__ void merge_heads(
    int n, int num_heads, const Cut& cut, Shared& shared, bf16* out, const Partials& partials) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int quad = lane % DIM_QUADS, row = lane / DIM_QUADS;
    int shift = num_heads == 1 ? 2 : num_heads == 2 ? 1 : 0;  // of the number of parts, 4, 2 or 1
    int parts = 1 << shift, part = warp >> (2 - shift);
    consumers_sync();  // the last reads of shared.o are over
#pragma unroll 1
    for (int head = warp & (3 >> shift); head < num_heads; head += WARPS) {
        int column = n * HEADS + head;
        float weight = 0.0f;
        Part whole;
        whole.clear();
#pragma unroll 1
        for (int i = 0, begin = part; begin < cut.num_splits;) {
            // The rows travel beside what they are weighed by.
            float2 mine = make_float2(-INFINITY_F, 0.0f);
            float4 o[MERGE_LOADS];
            int lane_split = begin + lane * parts;
            float2* at = partials.max_sum(Partials::slot_of(cut.first, lane_split), column);
            bool has = i == 0 && lane_split < cut.num_splits;
            auto split_of = [&](int k) { return begin + (i + k * ROWS_AT_ONCE + row) * parts; };
            auto row_at = [&](int k) {
                return partials.o(Partials::slot_of(cut.first, split_of(k)), column) + quad;
            };
            uint32_t top;
            do {
                if (has) mine = ask(at);
#pragma unroll
                for (int k = 0; k < MERGE_LOADS; k++)
                    o[k] = split_of(k) < cut.num_splits ? ask(row_at(k))
                                                        : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                top = highest(mine);
#pragma unroll
                for (int k = 0; k < MERGE_LOADS; k++) top = max(top, highest(o[k]));
            } while (top == UNWRITTEN);
            if (has) put_back(at);
#pragma unroll
            for (int k = 0; k < MERGE_LOADS; k++)
                if (split_of(k) < cut.num_splits) put_back(row_at(k));
            if (i == 0) {
                float max = fmaxf(whole.max, warp_max(mine.x));
                whole.rescale(max);
                weight = exp2_fast(mine.x - max);
                whole.sum += warp_sum(mine.y * weight);
            }
#pragma unroll
            for (int k = 0; k < MERGE_LOADS; k++)
                whole.add(o[k], __shfl_sync(~0u, weight, i + k * ROWS_AT_ONCE + row));
            i += MERGE_LOADS * ROWS_AT_ONCE;
            if (i == 32 || begin + i * parts >= cut.num_splits) begin += 32 * parts, i = 0;
        }
        float4& o = whole.o;
        if (ROWS_AT_ONCE == 2) {
            o.x += __shfl_xor_sync(~0u, o.x, 16), o.y += __shfl_xor_sync(~0u, o.y, 16);
            o.z += __shfl_xor_sync(~0u, o.z, 16), o.w += __shfl_xor_sync(~0u, o.w, 16);
        }
        if (parts == 1) {
            if (row == 0) whole.store(out + column * HEAD_DIM, quad);
        } else {
            if (row == 0) ((float4*)shared.merged[warp])[quad] = o;
            if (lane == 0) shared.merged_max[warp] = whole.max, shared.sum[warp][0] = whole.sum;
        }
    }
    if (parts == 1) return;
    consumers_sync();
    for (int i = threadIdx.x; i < num_heads * HEAD_DIM; i += CONSUMERS) {
        int head = i / HEAD_DIM;
        float max = -INFINITY_F, total = 0.0f, o = 0.0f;
        for (int w = head; w < WARPS; w += num_heads) max = fmaxf(max, shared.merged_max[w]);
        for (int w = head; w < WARPS; w += num_heads) {
            float scale = exp2_fast(shared.merged_max[w] - max);
            total += shared.sum[w][0] * scale;
            o += shared.merged[w][i % HEAD_DIM] * scale;
        }
        out[n * HEADS * HEAD_DIM + i] = float_to_bf16(__fdividef(o, total));
    }
}

// Joins the four warps' results of heads n * 8 .. n * 8 + 7. Where the pair is whole in this block
// the result goes out, else to a partial slot (or the cluster's first block), or together with the
// others' parts. `side` alternates between calls.
__device__ void finish_heads(
    Accumulator& acc, int n, int num_heads, int side, Shared& shared, const Cut& cut, bool even,
    uint8_t* behind_stages, bf16* out, const Partials& partials) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float2 sum = make_float2(acc.sum[n][0], acc.sum[n][1]);
    if (g == 0)
        *(float2*)&shared.max[side][warp][2 * t] = make_float2(acc.max[n][0], acc.max[n][1]);
#pragma unroll
    for (int offset = 4; offset < 32; offset <<= 1) {
        sum.x += __shfl_xor_sync(~0u, sum.x, offset);
        sum.y += __shfl_xor_sync(~0u, sum.y, offset);
    }
    consumers_sync();  // and the last reads of shared.o and shared.sum are over
    if (2 * t < num_heads) {
        float2 max = make_float2(-INFINITY_F, -INFINITY_F);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 other = *(const float2*)&shared.max[side][w][2 * t];
            max.x = fmaxf(max.x, other.x), max.y = fmaxf(max.y, other.y);
        }
        // 0 for a warp without tokens.
        float scale[2] = {exp2_fast(acc.max[n][0] - max.x), exp2_fast(acc.max[n][1] - max.y)};
        if (g == 0)
            *(float2*)&shared.sum[warp][2 * t] = make_float2(sum.x * scale[0], sum.y * scale[1]);
#pragma unroll
        for (int m = 0; m < 2 * DIM_TILES; m++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                shared.o[warp][2 * t + j][m * 8 + g] =
                    acc.o[n][m / 2][m % 2 * 2 + j] * scale[j];
    }
    consumers_sync();
    const int quad = threadIdx.x % DIM_QUADS;
    const bool is_few = cut.num_splits <= FEW_SPLITS;
#pragma unroll 1
    for (int first = 0; first < num_heads; first += HEADS_AT_ONCE) {
        const int head = first + threadIdx.x / DIM_QUADS, column = n * HEADS + head;
        const bool exists = head < num_heads;
        Part part;
        part.clear();
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            part.max = fmaxf(part.max, shared.max[side][w][head]);
            part.sum += shared.sum[w][head];
            part.add(*(const float4*)&shared.o[w][head][4 * quad], 1.0f);
        }
#if CLUSTER > 1
        if (even) {
            const Received received = {behind_stages, num_heads, shared};
            if (!exists) continue;
            if (cut.split > 0) {
                received.send(part, cut.split, head);
                continue;
            }
            if (cut.num_splits > 1) received.add_to(part, head, cut.num_splits);
            part.store(out + column * HEAD_DIM, quad);
            continue;
        }
#endif
        if (cut.split > 0 || !is_few) {
            const int slot = Partials::slot_of(cut.first, cut.split);
            if (exists) put(partials.o(slot, column) + quad, part.o);
            if (exists && quad == 0)
                put(partials.max_sum(slot, column), make_float2(part.max, part.sum));
            continue;
        }
        merge_few(part, column, exists, cut, partials);
        if (exists) part.store(out + column * HEAD_DIM, quad);
    }
    if (cut.split == 0 && !is_few) merge_heads(n, num_heads, cut, shared, out, partials);
}
