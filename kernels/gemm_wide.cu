/*
gemm_wide: out = x W^T for up to COLUMNS rows of x and a large W, on Hopper (sm_90a): TMA and wgmma.

x [num_rows][K], W [N][K], out [num_rows][N] with a stride, bf16; the sum is kept in float and rounded
once. `add`: the old value of out is part of it. `normed`: the product is that of x / rms(x), by
scaling the float sums (a norm's weight is part of W). GATED: W is gate rows, then up rows, and
out [num_rows][N / 2] = silu(gate) * up, rounded as in silu_mul.cu.

The time of such a product is that of reading W, if nothing else is in its way:
- W's rows are the M of wgmma, x's rows its N, so no product is padded to 64 rows of x. A tile is
  FEATURES rows of W.
- Few tiles (SPLIT > 1): a cluster of SPLIT blocks shares K of one tile. Each block then finishes a
  part of the tokens, with sums that the others store straight into its shared memory (st.async).
- Many tiles (SPLIT 1), stream-K: the steps of K of all tiles stand in one line, and each block takes
  an equal piece. Where a piece begins inside a tile, its sums go to `partials`, and whoever has the
  tile's beginning adds them in the order of K. A block's partial tile is computed first and the
  beginning of another last, so that nobody waits long.
- Both add in a fixed order: equal inputs give equal bits.
- W is never written: the ring fills with it before griddepcontrol.wait. There is no fence of cluster
  or GPU scope, which would drain the memory system: partial sums and scales are messages (message.cuh).
- 1 / rms of the rows of x is found beside the loop by the spare warps, a row or few a block; one warp of
  each block then brings that of all rows to shared memory, where those who have sums find it. Each way
  to the memory takes 3 us there, behind a ring of weights: there are two.

Roles: WARPGROUPS groups of 64 rows of W each (GATED: and the 64 up rows to them) compute; one thread
of a further group copies, and its other warps are the spare ones. In registers a thread has features
g and g + 8 of tokens 2t, 2t + 1; movmatrix and a shuffle turn them, so that a lane stores four
neighbours of out.

Launch: SPLIT 1: at most one block a step of K; SPLIT > 1: grid = tiles * SPLIT; blocks wait for each
other, so the grid is at most what the device holds at once. block = 128 * (WARPGROUPS + 1); shared
memory as cuda_wide.py has it.
partials: grid * SUBTILES * 64 * WARPGROUPS * COLUMNS float32; scales: 256 float32, then an int32. All
bits of the floats are set before the first launch, and left so; the int32 is zero, and left zero.
weight_map: boxes of FEATURES rows x 64; x_map: boxes of COLUMNS x 64; 128B swizzle, zeros outside.
K a multiple of 64 and at least SPLIT * 64, N of 8 (GATED: 16), the stride of out of 4.
-D COLUMNS (16 .. 64, a multiple of 16), GATED (0, 1), WARPGROUPS (1, 2), SPLIT (1 .. 8; GATED: 1).
Programmatic dependent launch is allowed.
*/
#include "cluster.cuh"        // defines: cluster_*, peer_address, send_to_peer, load_shared
#include "common.cuh"         // defines: bf16 helpers, mbarrier_*, movmatrix_trans, pdl_*
#include "hopper.cuh"         // defines: wgmma_*, matrix_descriptor, tensor_copy, named_barrier_sync
#include "message.cuh"        // defines: ask, highest, put, put_back, UNWRITTEN
#include "wgmma_columns.cuh"  // defines: wgmma_columns
#include "wide_plan.cuh"      // defines: sizes, Arguments, Piece, Ring
#include "wide_scales.cuh"    // defines: find_scales, fetch_scales, scale

namespace {

__device__ __forceinline__ void copy(
    const Arguments& a, const TensorMap& weight_map, const TensorMap& x_map, Ring ring) {
    const uint64_t once = policy_evict_first(), often = policy_evict_last();
    const Piece piece(a);
    auto copy_weight = [&](int at) {
        const int tile = at / piece.steps_of_tile, step = at - tile * piece.steps_of_tile;
        mbarrier_arrive_expect(ring.full + 8 * ring.stage, STAGE_BYTES);
        for (int s = 0; s < SUBTILES; s++)
            tensor_copy(ring.weight() + s * BOX_BYTES, weight_map, step * STEP_K,
                tile * FEATURES + s * a.width(), ring.full + 8 * ring.stage, once);
    };
    auto copy_x = [&](int at) {
        tensor_copy(ring.x(), x_map, at % piece.steps_of_tile * STEP_K, 0,
            ring.full + 8 * ring.stage, often);
    };
    // W of the first stages, before the kernels before are complete; then x of the same.
    const Ring start = ring;
    const int filled = min(piece.end, piece.at + ring.count);
    for (int at = piece.at; at < filled; at++, ring.advance()) copy_weight(at);
    pdl_wait();
    ring = start;
    for (int at = piece.at; at < filled; at++, ring.advance()) copy_x(at);
    for (int at = filled; at < piece.end; at++, ring.advance()) {
        mbarrier_wait(ring.empty + 8 * ring.stage, ring.parity ^ 1);
        copy_weight(at);
        copy_x(at);
    }
    pdl_launch_dependents();  // their loads follow the last of these, and do not delay any
}

// Sums over some steps; sums[1]: of the up rows.
__device__ __forceinline__ void multiply(
    float (&sums)[SUBTILES][SUMS], Ring& ring, int num_steps, int warpgroup) {
    auto release = [&](int stage) {
        if ((threadIdx.x & 31) == 0) mbarrier_arrive(ring.empty + 8 * stage);
    };
    int last_stage = 0;
    for (int step = 0; step < num_steps; step++) {
        mbarrier_wait(ring.full + 8 * ring.stage, ring.parity);
        const uint32_t w = matrix_descriptor(ring.weight() + warpgroup * 8192, 16);
        const uint32_t x = matrix_descriptor(ring.x(), 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < STEP_K / 16; i++)
#pragma unroll
            for (int s = 0; s < SUBTILES; s++)
                wgmma_columns(sums[s], w + s * (BOX_BYTES >> 4) + 2 * i, x + 2 * i, step + i);
        wgmma_commit();
        if (step > 0) {
            wgmma_wait<1>();
            release(last_stage);
        }
        last_stage = ring.stage;
        ring.advance();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int s = 0; s < SUBTILES; s++) pin(sums[s]);
    release(last_stage);
}

#if SPLIT > 1
constexpr int CONSUMERS = 128 * WARPGROUPS;

__device__ __forceinline__ int groups_of(int rank) {
    return max(0, min(SHARE, GROUPS - rank * SHARE));
}

// The bytes that this block will receive: announced before anybody can send.
__device__ __forceinline__ int received_bytes(int rank) {
    return (SPLIT - 1) * groups_of(rank) * CONSUMERS * 16;
}

// mine: this block's groups, over all of K. The rings are free, all over the cluster.
__device__ __forceinline__ void exchange(
    const float (&sums)[SUMS], float (&mine)[SHARE * 4], const Ring& ring, int rank) {
    auto slot = [&](int sender, int group) {
        return ring.stages + ((sender * SHARE + group) * CONSUMERS + threadIdx.x) * 16;
    };
#pragma unroll
    for (int to = 0; to < SPLIT; to++)
#pragma unroll
        for (int group = 0; group < SHARE && to * SHARE + group < GROUPS; group++) {
            const float* sum = &sums[(to * SHARE + group) * 4];
            if (to == rank) {
#pragma unroll
                for (int i = 0; i < 4; i++) mine[group * 4 + i] = sum[i];
            } else {
                send_to_peer(peer_address(slot(rank < to ? rank : rank - 1, group), to),
                    make_float4(sum[0], sum[1], sum[2], sum[3]), peer_address(ring.received, to));
            }
        }
    mbarrier_wait(ring.received, 0);
#pragma unroll
    for (int sender = 0; sender < SPLIT - 1; sender++)
#pragma unroll
        for (int group = 0; group < SHARE; group++) {
            if (group >= groups_of(rank)) break;
            const float4 part = load_shared(slot(sender, group));
            float* sum = &mine[group * 4];
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
}
#else
constexpr int QUADS = SUBTILES * GROUPS;  // float4 of partial sums, a thread

// Where a warpgroup of a block keeps its partial sums.
__device__ __forceinline__ float4* partial_of(const Arguments& a, int block, int warpgroup) {
    return a.partials + (int64_t)(block * WARPGROUPS + warpgroup) * QUADS * 128 +
           (threadIdx.x & 127);
}

__device__ __forceinline__ void store_partial(
    const Arguments& a, const float (&sums)[SUBTILES][SUMS], int warpgroup) {
    float4* to = partial_of(a, blockIdx.x, warpgroup);
#pragma unroll
    for (int s = 0; s < SUBTILES; s++)
#pragma unroll
        for (int i = 0; i < SUMS; i += 4) {
            // Copies: ptxas would not overlap wgmma whose own registers are compared.
            float quad[4] = {sums[s][i], sums[s][i + 1], sums[s][i + 2], sums[s][i + 3]};
            pin(quad);
            put(to + (s * SUMS + i) / 4 * 128, make_float4(quad[0], quad[1], quad[2], quad[3]));
        }
}

// Adds what the next blocks have of this tile, until its last step.
__device__ __forceinline__ void add_partials(
    const Arguments& a, float (&sums)[SUBTILES][SUMS], const Piece& piece, int warpgroup) {
    constexpr int BATCH = QUADS < 8 ? QUADS : 8;  // under way at once
    const int tile_end = (piece.tile + 1) * piece.steps_of_tile;
    for (int block = blockIdx.x + 1, at = piece.end; at < tile_end; block++) {
        at = piece.begin_of(a, block + 1);
        float4* const from = partial_of(a, block, warpgroup);
#pragma unroll
        for (int first = 0; first < QUADS; first += BATCH) {
            float4 parts[BATCH];
            uint32_t top;
            do {  // the lanes stay together, or wgmma of the next tile would not be overlapped
                top = 0;
#pragma unroll
                for (int i = 0; i < BATCH; i++) parts[i] = ask(from + (first + i) * 128);
#pragma unroll
                for (int i = 0; i < BATCH; i++) top = max(top, highest(parts[i]));
            } while (__any_sync(~0u, top == UNWRITTEN));
#pragma unroll
            for (int i = 0; i < BATCH; i++) {
                const float4& part = parts[i];
                float* const sum = &sums[(first + i) / GROUPS][(first + i) % GROUPS * 4];
                put_back(from + (first + i) * 128);
                sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
            }
        }
    }
}
#endif

#if GATED
// The sums of the gate rows become silu(gate) * up.
__device__ __forceinline__ void gate(float (&sums)[SUBTILES][SUMS]) {
#pragma unroll
    for (int i = 0; i < SUMS; i++)
        sums[0][i] = round_bf16(silu(round_bf16(sums[0][i]))) * round_bf16(sums[1][i]);
}
#endif

// Rounds sums of tokens 8 * first_group and on, and stores them, four neighbours of out a lane.
template <int COUNT>
__device__ __forceinline__ void store_tile(
    const Arguments& a, const float (&sums)[COUNT], int feature, int first_group) {
    constexpr int NUM_GROUPS = COUNT / 4;
    constexpr int BATCH = 4;  // groups whose old values are read together
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const bool odd = t & 1;
    const int column = feature + (odd ? 8 + 2 * (t - 1) : 2 * t);
    bf16* const to = a.out + column;
    const bool inside = column < a.width();
#pragma unroll
    for (int first = 0; first < NUM_GROUPS; first += BATCH) {
        const int first_token = (first_group + first) * 8;
        if (first_token >= a.num_rows) break;
        uint2 old[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int token = first_token + i * 8 + g;
            old[i] = make_uint2(0, 0);
            if (a.add && inside && token < a.num_rows)
                old[i] = __ldcg((const uint2*)(to + (int64_t)token * a.out_stride));
        }
#pragma unroll
        for (int i = 0; i < BATCH && first + i < NUM_GROUPS; i++) {
            const float* sum = &sums[4 * (first + i)];
            // Each turn: the halves of 8 features change places between neighbouring lanes.
            const uint32_t other = __shfl_xor_sync(~0u, odd ? old[i].x : old[i].y, 1);
            const uint32_t low = movmatrix_trans(odd ? other : old[i].x);
            const uint32_t high = movmatrix_trans(odd ? old[i].y : other);
            const uint32_t sum_low =
                movmatrix_trans(pack_bf16(sum[0] + bf16_low(low), sum[1] + bf16_high(low)));
            const uint32_t sum_high =
                movmatrix_trans(pack_bf16(sum[2] + bf16_low(high), sum[3] + bf16_high(high)));
            const uint32_t received = __shfl_xor_sync(~0u, odd ? sum_low : sum_high, 1);
            const int token = first_token + i * 8 + g;
            if (inside && token < a.num_rows)
                *(uint2*)(to + (int64_t)token * a.out_stride) =
                    odd ? make_uint2(received, sum_high) : make_uint2(sum_low, received);
        }
    }
}

__device__ __forceinline__ void compute(
    const Arguments& a, Ring ring, const float* row_scales, int warpgroup) {
    const int in_tile = warpgroup * 64 + (threadIdx.x / 32 & 3) * 16;
    Piece piece(a);
    while (piece.next()) {
        float sums[SUBTILES][SUMS];
        multiply(sums, ring, piece.last - piece.first, warpgroup);
        const int feature = piece.tile * FEATURES + in_tile;
#if SPLIT > 1
        cluster_arrive_relaxed();
        cluster_wait();
        const int rank = blockIdx.x % SPLIT;
        float mine[SHARE * 4] = {};
        exchange(sums[0], mine, ring, rank);
        if (a.normed) {
            mbarrier_wait(ring.scaled, 0);
            scale(mine, row_scales, rank * SHARE);
        }
        store_tile(a, mine, feature, rank * SHARE);
#else
        if (piece.first > 0) {
            store_partial(a, sums, warpgroup);
            continue;
        }
        if (piece.last < piece.steps_of_tile) add_partials(a, sums, piece, warpgroup);
        if (a.normed) {
            mbarrier_wait(ring.scaled, 0);
#pragma unroll
            for (int s = 0; s < SUBTILES; s++) scale(sums[s], row_scales, 0);
        }
#if GATED
        gate(sums);
#endif
        store_tile(a, sums[0], feature, 0);
#endif
    }
}

}  // namespace

extern "C" __global__ void
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
__launch_bounds__(BLOCK, MIN_BLOCKS) gemm_wide(
    const __grid_constant__ TensorMap weight_map, const __grid_constant__ TensorMap x_map,
    bf16* out, const bf16* x, float4* partials, float* scales, int num_rows, int n,
    int k, int out_stride, int stages, int add, int normed, float eps) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const Arguments a{
        out, x, partials, scales, num_rows, n, k, out_stride, stages, add, normed, eps};
    const Ring ring(shared_address(shared), stages);
    float* const row_scales = (float*)(shared + SCALES_OFFSET);
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages; i++) {
            mbarrier_init(ring.full + 8 * i, 1);
            mbarrier_init(ring.empty + 8 * i, 4 * WARPGROUPS);
        }
        mbarrier_init(ring.received, 1);
        mbarrier_init(ring.scaled, 32);
        mbarrier_init_fence();
#if SPLIT > 1
        mbarrier_arrive_expect(ring.received, received_bytes(blockIdx.x % SPLIT));
#endif
    }
    __syncthreads();
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (warpgroup == WARPGROUPS) {
        if (threadIdx.x == 128 * WARPGROUPS) copy(a, weight_map, x_map, ring);
        const int spare = (int)threadIdx.x - 128 * WARPGROUPS - 32;
        if (normed && spare >= 0) {
            pdl_wait();
            find_scales(a, spare, row_scales + NUM_SCALES);
            if (spare < 32) fetch_scales(a, ring, row_scales);
        }
#if SPLIT > 1
        cluster_arrive_relaxed();  // last: it holds a warp until those that compute arrive
#endif
    } else {
        pdl_wait();
        compute(a, ring, row_scales, warpgroup);
    }
}
