/* Prefill attention over KV pages for Hopper (sm_90a): wgmma, bulk copies, specialised warps.

   Computes what attention_prefill.cu does, over the same work list (prefill_tiles.cuh). A
   persistent block takes tiles of ROWS packed rows until none is left. Its roles:

     warp 0      copies K and V, 128 keys at a time, from the pages to a ring of STAGES stages. A
                 page holds its rows as wgmma's 128B swizzle wants them, so one linear bulk copy
                 moves half a page (64 dims of all its keys)
     warps 1, 2  copy the rows of Q of the next tile, swizzled, while this one is computed
     warp 3      takes tile numbers from a counter in global memory and posts tiles in a mailbox
     the rest    WARPGROUPS groups of 64 rows: S = Q K^T, online softmax, O += P V

   A warpgroup issues S of the next keys before O of the last, so that its softmax runs beside
   products, its own and the other group's; at the end of a tile the next keys are the next tile's.
   Keys are taken from the last to the first: the causal mask then ends with the first iterations.

   Few rows over many keys would leave most of the chip idle: the host then asks for num_splits > 1,
   and each tile is done in up to that many parts of its keys, as separate entries of the work list.
   Parts go to `partials` and attention_prefill_combine joins them (prefill_store_sm90.cuh).

   O leaves through the tile's own part of the Q buffer.

   Launch: grid = min(SMs, upper bound of the number of tiles); block = 128 * (1 + WARPGROUPS);
   shared memory = AT_BARRIERS + 1024 below; workspace = two zeroed int32, left zero;
   partials = tiles * num_splits * PARTIAL_FLOATS float32 if num_splits > 1.
   -D HEAD_DIM (64, 128). page_size: 16 .. 256, a power of two. */

#include "common.cuh"              // defines: bf16, mbarrier_*, pack_bf16, exp2_fast, pdl_wait
#include "hopper.cuh"              // defines: wgmma_*, matrix_descriptor, registers_*
#include "prefill_feed_sm90.cuh"   // defines: layout, Work, RowOffsets, schedule, load_kv, load_q
#include "prefill_store_sm90.cuh"  // defines: store_partial, store_output, reciprocal
#include "prefill_tiles.cuh"       // defines: PrefillTile, PrefillTiles, divide_by_group

namespace {

constexpr int COMBINE_THREADS = 512;
constexpr int PRODUCER_REGISTERS = 56;
constexpr int CONSUMER_REGISTERS = 224;

// The running maximum of a row moves only when it grows by more than this, as a power of two: P may
// then reach 2^8, which costs no accuracy, and O need hardly ever be rescaled.
constexpr float LAZY_LOG2 = 8.0f;

__device__ __forceinline__ void issue_scores(float (&s)[64], uint32_t q, uint32_t k) {
    const uint32_t a = matrix_descriptor(q, 16), b = matrix_descriptor(k, 16);
    wgmma_m64n128_ss<false>(s, a, b);
#pragma unroll
    for (int i = 1; i < HEAD_DIM / 16; i++) {
        wgmma_m64n128_ss<true>(s, a + (i / 4) * (8192 >> 4) + (i % 4) * 2,
            b + (i / 4) * (HALF_BYTES >> 4) + (i % 4) * 2);
    }
    wgmma_commit();
}

__device__ __forceinline__ void issue_output(
    float (&o)[HEAD_DIM / 2], const uint32_t (&p)[32], uint32_t v) {
    const uint32_t b = matrix_descriptor(v, HALF_BYTES);
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) {
#if HEAD_DIM == 128
        wgmma_m64n128_rs(o, p + 4 * i, b + i * (2048 >> 4));
#else
        wgmma_m64n64_rs(o, p + 4 * i, b + i * (2048 >> 4));
#endif
    }
    wgmma_commit();
}

// One step of the online softmax: s becomes exp2(s * scale - maximum), unrounded; row_sum counts
// this thread's columns only. `rescale` is what older sums and outputs must be multiplied with.
__device__ __forceinline__ void softmax(float (&s)[64], float (&row_max)[2], float (&row_sum)[2],
    float (&rescale)[2], float scale_log2, const int (&limit)[2], int first_seen, int first_key) {
    if (first_key + KEYS - 1 > first_seen) {
#pragma unroll
        for (int i = 0; i < 64; i++) {
            const int key = first_key + i / 4 * 8 + (i & 1);
            if (key > limit[i / 2 & 1]) s[i] = -INFINITY_F;
        }
    }
    // Two chains a row, the rows side by side: nothing here has anything else to wait for.
    float highest[4];
#pragma unroll
    for (int c = 0; c < 4; c++) highest[c] = fmaxf(s[c], s[c + 4]);
#pragma unroll
    for (int i = 8; i < 64; i++) highest[i & 3] = fmaxf(highest[i & 3], s[i]);
    float top[2] = {fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3])};
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const float other[2] = {
            __shfl_xor_sync(~0u, top[0], step), __shfl_xor_sync(~0u, top[1], step)};
        top[0] = fmaxf(top[0], other[0]);
        top[1] = fmaxf(top[1], other[1]);
    }
    float shift[2], sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool moved = (top[r] - row_max[r]) * scale_log2 > LAZY_LOG2;
        const float next = moved ? top[r] : row_max[r];
        // A row that sees none of the keys yet has maximum -inf: its exponentials must be 0.
        shift[r] = next == -INFINITY_F ? 0.0f : next * scale_log2;
        rescale[r] = moved ? exp2_fast(row_max[r] * scale_log2 - shift[r]) : 1.0f;
        row_max[r] = next;
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
        s[i] = exp2_fast(s[i] * scale_log2 - shift[i / 2 & 1]);
        sum[i & 3] += s[i];
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        row_sum[r] = row_sum[r] * rescale[r] + (sum[2 * r] + sum[2 * r + 1]);
    }
}

__device__ __forceinline__ void round_scores(const float (&s)[64], uint32_t (&p)[32]) {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = pack_bf16(s[2 * i], s[2 * i + 1]);
}

__device__ __forceinline__ void rescale_output(
    float (&o)[HEAD_DIM / 2], const float (&rescale)[2]) {
    if (__all_sync(~0u, rescale[0] == 1.0f && rescale[1] == 1.0f)) return;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] *= rescale[i / 2 & 1];
}

struct Ring {
    int stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ void compute(uint32_t base, char* shared, const int* mailbox, bf16* out,
    float* partials, int num_kv_heads, int group, int num_splits, float scale, int warpgroup) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 & 3, 0), lane = threadIdx.x & 31;
    const int in_tile = 64 * warpgroup + 16 * warp;  // this warp's first row
    const uint32_t inverse = group_inverse(group);
    const float scale_log2 = scale * LOG2E;
    float s[64], o[HEAD_DIM / 2], row_max[2], row_sum[2], rescale[2];
    uint32_t p[32];
    Ring keys, values;
    Work work = read_work(base, mailbox, 0);
    if (work.tile.sequence < 0) return;
    int limit[2];    // last key that rows g and g + 8 see, from this thread's first column
    int first_seen;  // the same of the group's first row: key tiles up to it need no mask
    int key_tile, last_key_tile, count = 0;

    auto begin = [&]() {
        const PrefillTile& tile = work.tile;
        const int cached = tile.context - tile.q_len, last_row = tile.q_len * group - 1;
        first_seen =
            cached + divide_by_group(min(tile.row + 64 * warpgroup, last_row), group, inverse);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = min(tile.row + in_tile + lane / 4 + 8 * r, last_row);
            limit[r] = cached + divide_by_group(row, group, inverse) - 2 * (lane & 3);
            row_max[r] = -INFINITY_F;
            row_sum[r] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.0f;
        const KeyTiles key_tiles = key_tiles_of(work, num_splits, group, inverse);
        key_tile = key_tiles.last;
        last_key_tile = key_tiles.first;
    };
    auto q_tile = [&](int number) {
        return AT_Q + (number & 1) * Q_BYTES + warpgroup * Q_GROUP_BYTES;
    };
    auto release = [&](uint32_t barrier) {
        if (lane == 0) mbarrier_arrive(base + barrier);
    };
    auto scores = [&](int number) {
        wgmma_fence();
        issue_scores(s, base + q_tile(number), base + AT_K + keys.stage * TILE_BYTES);
    };
    auto output = [&]() {
        mbarrier_wait(base + FULL_V + 8 * values.stage, values.parity);
        wgmma_fence();
        issue_output(o, p, base + AT_V + values.stage * TILE_BYTES);
    };
    auto keys_done = [&]() {
        pin(s);
        release(EMPTY_K + 8 * keys.stage);
        keys.advance();
    };
    auto values_done = [&]() {
        pin(o);
        pin(p);
        release(EMPTY_V + 8 * values.stage);
        values.advance();
    };
    auto store = [&]() {
        if (num_splits > 1) {
            // Slot: the work's place in the list, as the combining kernel counts it.
            store_partial(o, row_max, row_sum, scale_log2,
                partials + (int64_t)work.slot * PARTIAL_FLOATS, in_tile);
        } else {
            named_barrier_sync(1 + warpgroup, 128);  // all of the group is done with its Q
            store_output(o, row_sum, shared + q_tile(count) + warp * 16 * 128, out, work.tile,
                work.tile.row + in_tile, num_kv_heads, group, inverse);
        }
        release(EMPTY_Q + 8 * (count & 1));
    };

    begin();
    mbarrier_wait(base + FULL_Q, 0);
    mbarrier_wait(base + FULL_K, 0);
    scores(0);
    wgmma_wait<0>();
    keys_done();
    softmax(s, row_max, row_sum, rescale, scale_log2, limit, first_seen, key_tile * KEYS);
    round_scores(s, p);
    // Each turn: S of the next keys, which may be the next tile's first, and O of the last.
    while (true) {
        const bool ends = key_tile == last_key_tile;
        Work next;
        if (ends) {
            next = read_work(base, mailbox, count + 1);
            if (next.tile.sequence < 0) break;
            mbarrier_wait(base + FULL_Q + 8 * ((count + 1) & 1), (count + 1) >> 1 & 1);
        }
        mbarrier_wait(base + FULL_K + 8 * keys.stage, keys.parity);
        scores(count + ends);
        output();
        wgmma_wait<1>();
        keys_done();
        if (ends) {
            wgmma_wait<0>();
            values_done();
            store();
            work = next;
            count++;
            begin();
        } else {
            key_tile--;
        }
        softmax(s, row_max, row_sum, rescale, scale_log2, limit, first_seen, key_tile * KEYS);
        wgmma_wait<0>();
        if (!ends) values_done();
        round_scores(s, p);
        rescale_output(o, rescale);
    }
    output();
    wgmma_wait<0>();
    values_done();
    store();
}

}  // namespace

// q [num_tokens, Hq, HEAD_DIM], out [num_tokens, Hq * HEAD_DIM]; kv: one layer's pages;
// page_table int32 [.., table_stride]; sequences first_seq .. first_seq + num_seqs - 1 of the step.
extern "C" __global__ void __launch_bounds__(128 * (1 + WARPGROUPS), 1) attention_prefill_sm90(
    const bf16* __restrict__ q, const char* __restrict__ kv, bf16* __restrict__ out,
    const int* __restrict__ q_start, const int* __restrict__ context_lens,
    const int* __restrict__ seq_slots, const int* __restrict__ page_table,
    int* __restrict__ workspace, float* __restrict__ partials, int first_seq, int num_seqs,
    int num_kv_heads, int group, int num_splits, int table_stride, int page_size, float scale) {
    extern __shared__ __align__(1024) char shared[];
    const uint32_t base = shared_address(shared);
    int* mailbox = reinterpret_cast<int*>(shared + AT_MAILBOX);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(base + FULL_K + 8 * i, 1);
            mbarrier_init(base + FULL_V + 8 * i, 1);
            mbarrier_init(base + EMPTY_K + 8 * i, CONSUMER_WARPS);
            mbarrier_init(base + EMPTY_V + 8 * i, CONSUMER_WARPS);
        }
        for (int i = 0; i < 2; i++) {
            mbarrier_init(base + FULL_Q + 8 * i, Q_WARPS);
            mbarrier_init(base + EMPTY_Q + 8 * i, CONSUMER_WARPS);
        }
        mbarrier_init(base + FULL_WORK, 1);
        mbarrier_init(base + EMPTY_WORK, 1 + Q_WARPS + CONSUMER_WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();
    pdl_wait();
    pdl_launch_dependents();  // not before the wait: attention_decode relies on it

    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (warpgroup == 0) {
        registers_shrink<PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (warp == 0) {
            load_kv(base, shared, mailbox, kv, seq_slots, page_table, table_stride, page_size,
                num_kv_heads, group, num_splits);
        } else if (warp == 3) {
            schedule(base, mailbox, q_start, context_lens, first_seq, num_seqs, num_kv_heads, group,
                num_splits, workspace);
        } else {
            load_q(base, mailbox, q, num_kv_heads, group, warp - 1);
        }
    } else {
        registers_grow<CONSUMER_REGISTERS>();
        compute(base, shared, mailbox, out, partials, num_kv_heads, group, num_splits, scale,
            warpgroup - 1);
    }
}

// Joins the splits of each tile in their order. One block a tile, one warp a row at a time.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    attention_prefill_combine(const float* __restrict__ partials, bf16* __restrict__ out,
        const int* __restrict__ q_start, const int* __restrict__ context_lens, int first_seq,
        int num_seqs, int num_kv_heads, int group, int num_splits) {
    constexpr int WIDTH = HEAD_DIM / 32;  // dims a lane
    pdl_wait();
    PrefillTiles<ROWS, HEAD_DIM * 4> tiles(
        q_start, context_lens, first_seq, num_seqs, group, num_kv_heads);
    const PrefillTile tile = tiles.find(blockIdx.x);
    if (tile.sequence < 0) return;
    const uint32_t inverse = group_inverse(group);
    const KeyTiles first = key_tiles_of({tile, 0, 0}, num_splits, group, inverse);
    const KeyTiles beyond = key_tiles_of({tile, num_splits, 0}, num_splits, group, inverse);
    const int each = first.last - first.first + 1;
    const int num_parts = (beyond.last + each) / each;  // beyond.last: the tile's last key tile
    const RowOffsets offsets(tile, num_kv_heads, group, inverse);
    const int num_rows = min(ROWS, tile.q_len * group - tile.row);
    const int lane = threadIdx.x & 31;
    for (int row = threadIdx.x / 32; row < num_rows; row += COMBINE_THREADS / 32) {
        const float* part = partials + (int64_t)blockIdx.x * num_splits * PARTIAL_FLOATS;
        float top = -INFINITY_F;
        for (int i = 0; i < num_parts; i++) {
            top = fmaxf(top, part[(int64_t)i * PARTIAL_FLOATS + ROWS * HEAD_DIM + row]);
        }
        float total = 0.0f, sum[WIDTH] = {};
#pragma unroll 4
        for (int i = 0; i < num_parts; i++, part += PARTIAL_FLOATS) {
            const float weight = exp2_fast(part[ROWS * HEAD_DIM + row] - top);
            total += weight;
#pragma unroll
            for (int d = 0; d < WIDTH; d++) {
                sum[d] += weight * part[row * HEAD_DIM + lane * WIDTH + d];
            }
        }
        const float inverse_total = reciprocal(total);
        bf16* to = out + offsets.first + offsets.of(tile.row + row) + lane * WIDTH;
#pragma unroll
        for (int d = 0; d < WIDTH; d += 2) {
            *reinterpret_cast<uint32_t*>(to + d) =
                pack_bf16(sum[d] * inverse_total, sum[d + 1] * inverse_total);
        }
    }
}
