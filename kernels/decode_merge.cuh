/*
The end of a segment of attention_decode: its warps' results become one, and where a (sequence, kv
head) pair was cut, the last block to arrive merges the parts of all, in the order of positions.

The code is kept short: it runs once or twice a launch with one warp a scheduler, so its cost is
the number of its dependent instructions.
*/
#pragma once

#include "decode_tile.cuh"  // defines: Shared, Accumulator, consumers_sync, HEADS, WARPS

// Adds 1 and returns what was there; at `limit` it wraps to 0, so the last arrival leaves a counter
// ready for the next launch. Orders the block's accesses before and after, at the GPU's scope.
__device__ __forceinline__ int atomic_inc_acq_rel(unsigned int* counter, unsigned int limit) {
    unsigned int old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(counter), "r"(limit)
                 : "memory");
    return old;
}

struct Partials {
    float* base;

    // [8 * HEAD_TILES][HEAD_DIM] of O, then as many pairs (max, sum).
    static constexpr int FLOATS = HEAD_TILES * HEADS * (HEAD_DIM + 2);
    // Of split i of a pair that starts in block `first`. A block has one segment at most that began
    // before it, and one at most that ends after it.
    __device__ static int slot_of(int first, int split) {
        return 2 * (first + split) + (split == 0 ? 1 : 0);
    }
    __device__ float* o(int slot, int head) const {
        return base + (uint32_t)(slot * FLOATS + head * HEAD_DIM);
    }
    __device__ float2* max_sum(int slot, int head) const {
        return (float2*)(base + (uint32_t)(slot * FLOATS + HEAD_TILES * HEADS * HEAD_DIM)) + head;
    }
};

// Joins the four warps' results of heads n * 8 .. n * 8 + 7. Where the pair is whole in this block
// the result goes out, else to a partial slot. `turn` alternates between calls.
__device__ void finish_heads(
    Accumulator& acc, int n, int num_heads, int turn, Shared& shared, bool whole, bf16* out,
    const Partials& partials, int slot) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float2 sum = make_float2(acc.sum[n][0], acc.sum[n][1]);
    if (g == 0)
        *(float2*)&shared.max[turn][warp][2 * t] = make_float2(acc.max[n][0], acc.max[n][1]);
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
            float2 other = *(const float2*)&shared.max[turn][w][2 * t];
            max.x = fmaxf(max.x, other.x), max.y = fmaxf(max.y, other.y);
        }
        // 0 for a warp without tokens.
        float scale[2] = {exp2_fast(acc.max[n][0] - max.x), exp2_fast(acc.max[n][1] - max.y)};
        if (g == 0)
            *(float2*)&shared.sum[warp][2 * t] = make_float2(sum.x * scale[0], sum.y * scale[1]);
#pragma unroll
        for (int m = 0; m < 2 * DIM_TILES; m++)
            *(float2*)&shared.o[warp][m * 8 + g][2 * t] = make_float2(
                acc.o[n][m / 2][m % 2 * 2] * scale[0], acc.o[n][m / 2][m % 2 * 2 + 1] * scale[1]);
    }
    consumers_sync();
    int dim = threadIdx.x % HEAD_DIM;
#pragma unroll 1
    for (int head = threadIdx.x / HEAD_DIM * 2; head < num_heads;
         head += 2 * CONSUMERS / HEAD_DIM) {
        float total[2] = {0.0f, 0.0f}, o[2] = {0.0f, 0.0f}, max[2] = {-INFINITY_F, -INFINITY_F};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 part = *(const float2*)&shared.o[w][dim][head];
            float2 part_sum = *(const float2*)&shared.sum[w][head];
            float2 part_max = *(const float2*)&shared.max[turn][w][head];
            o[0] += part.x, o[1] += part.y;
            total[0] += part_sum.x, total[1] += part_sum.y;
            max[0] = fmaxf(max[0], part_max.x), max[1] = fmaxf(max[1], part_max.y);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (head + j >= num_heads) break;
            int column = n * HEADS + head + j;
            if (whole) {
                out[column * HEAD_DIM + dim] = float_to_bf16(__fdividef(o[j], total[j]));
            } else {
                partials.o(slot, column)[dim] = o[j];
                if (dim == 0) *partials.max_sum(slot, column) = make_float2(max[j], total[j]);
            }
        }
    }
}

// Merges a few partials of one (sequence, head) pair, heads n * 8 .. n * 8 + 7. A thread takes four
// dims of a head, or of two, and asks for SPLITS_AT_ONCE rows of each at once.
__device__ void merge_few(
    int n, int num_heads, int first, int num_splits, bf16* out, const Partials& partials) {
    constexpr int HEADS_AT_ONCE = CONSUMERS / DIM_QUADS;
    constexpr int TURNS = HEADS / HEADS_AT_ONCE;
    int quad = threadIdx.x % DIM_QUADS, head = threadIdx.x / DIM_QUADS;
    float max[TURNS], total[TURNS];
    float4 sum[TURNS];
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        max[turn] = -INFINITY_F, total[turn] = 0.0f;
        sum[turn] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
#pragma unroll 1
    for (int begin = 0; begin < num_splits; begin += SPLITS_AT_ONCE) {
        float2 max_sum[TURNS][SPLITS_AT_ONCE];
        float4 o[TURNS][SPLITS_AT_ONCE];
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            int column = n * HEADS + head + turn * HEADS_AT_ONCE;
            if (head + turn * HEADS_AT_ONCE >= num_heads) break;
#pragma unroll
            for (int k = 0; k < SPLITS_AT_ONCE; k++) {
                max_sum[turn][k] = make_float2(-INFINITY_F, 0.0f);
                o[turn][k] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (begin + k >= num_splits) continue;
                int slot = Partials::slot_of(first, begin + k);
                max_sum[turn][k] = __ldcg(partials.max_sum(slot, column));
                o[turn][k] = __ldcg((const float4*)partials.o(slot, column) + quad);
            }
        }
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            if (head + turn * HEADS_AT_ONCE >= num_heads) break;
            float updated = max[turn];
#pragma unroll
            for (int k = 0; k < SPLITS_AT_ONCE; k++) updated = fmaxf(updated, max_sum[turn][k].x);
            float alpha = exp2_fast(max[turn] - updated);
            max[turn] = updated;
            total[turn] *= alpha;
            sum[turn].x *= alpha, sum[turn].y *= alpha, sum[turn].z *= alpha, sum[turn].w *= alpha;
#pragma unroll
            for (int k = 0; k < SPLITS_AT_ONCE; k++) {
                float weight = exp2_fast(max_sum[turn][k].x - updated);
                total[turn] += max_sum[turn][k].y * weight;
                sum[turn].x += o[turn][k].x * weight, sum[turn].y += o[turn][k].y * weight;
                sum[turn].z += o[turn][k].z * weight, sum[turn].w += o[turn][k].w * weight;
            }
        }
    }
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
        int head_of_turn = head + turn * HEADS_AT_ONCE;
        if (head_of_turn >= num_heads) break;
        float inverse = __fdividef(1.0f, total[turn]);
        ((uint2*)(out + (n * HEADS + head_of_turn) * HEAD_DIM))[quad] = make_uint2(
            pack_bf16(sum[turn].x * inverse, sum[turn].y * inverse),
            pack_bf16(sum[turn].z * inverse, sum[turn].w * inverse));
    }
}

// Merges any number of them. A warp takes whole heads; with one or two heads, part of the splits of
// one. Its lanes weigh 32 splits at a time.
__device__ void merge_heads(
    int n, int num_heads, int first, int num_splits, Shared& shared, bf16* out,
    const Partials& partials) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int quad = lane % DIM_QUADS, row = lane / DIM_QUADS;
    int shift = num_heads == 1 ? 2 : num_heads == 2 ? 1 : 0;  // of the number of parts, 4, 2 or 1
    int parts = 1 << shift, part = warp >> (2 - shift);
#pragma unroll 1
    for (int head = warp & (3 >> shift); head < num_heads; head += WARPS) {
        int column = n * HEADS + head;
        float max = -INFINITY_F, total = 0.0f, weight = 0.0f;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int i = 0, begin = part; begin < num_splits;) {
            // The rows travel beside what they are weighed by: nothing waits before both are asked
            // for. Past the end the last row comes again, with weight 0.
            float2 mine = make_float2(-INFINITY_F, 0.0f);
            int lane_split = begin + lane * parts;
            if (i == 0 && lane_split < num_splits)
                mine = __ldcg(partials.max_sum(Partials::slot_of(first, lane_split), column));
            float4 o[MERGE_LOADS];
            int split = begin + (i + row) * parts;
#pragma unroll
            for (int k = 0; k < MERGE_LOADS; k++) {
                int clamped = min(split, num_splits - 1);
                int slot = k == 0 ? Partials::slot_of(first, clamped) : 2 * (first + clamped);
                o[k] = __ldcg((const float4*)partials.o(slot, column) + quad);
                split += ROWS_AT_ONCE * parts;
            }
            if (i == 0) {
                float updated = fmaxf(max, warp_max(mine.x));
                float alpha = exp2_fast(max - updated);
                weight = exp2_fast(mine.x - updated);
                max = updated;
                total = total * alpha + warp_sum(mine.y * weight);
                sum.x *= alpha, sum.y *= alpha, sum.z *= alpha, sum.w *= alpha;
            }
#pragma unroll
            for (int k = 0; k < MERGE_LOADS; k++) {
                float scale = __shfl_sync(~0u, weight, i + k * ROWS_AT_ONCE + row);
                sum.x += o[k].x * scale, sum.y += o[k].y * scale;
                sum.z += o[k].z * scale, sum.w += o[k].w * scale;
            }
            i += MERGE_LOADS * ROWS_AT_ONCE;
            if (i == 32 || begin + i * parts >= num_splits) begin += 32 * parts, i = 0;
        }
        if (ROWS_AT_ONCE == 2) {
            sum.x += __shfl_xor_sync(~0u, sum.x, 16), sum.y += __shfl_xor_sync(~0u, sum.y, 16);
            sum.z += __shfl_xor_sync(~0u, sum.z, 16), sum.w += __shfl_xor_sync(~0u, sum.w, 16);
        }
        if (parts == 1) {
            if (row == 0)
                ((uint2*)(out + (n * HEADS + head) * HEAD_DIM))[quad] = make_uint2(
                    pack_bf16(__fdividef(sum.x, total), __fdividef(sum.y, total)),
                    pack_bf16(__fdividef(sum.z, total), __fdividef(sum.w, total)));
        } else {
            if (row == 0) ((float4*)shared.merged[warp])[quad] = sum;
            if (lane == 0) shared.merged_max[warp] = max, shared.sum[warp][0] = total;
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
