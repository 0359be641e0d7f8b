/*
1 / rms of the rows of x in gemm_wide: found by the spare warps of all blocks, brought to each block, and
put to its sums. The scales are messages (message.cuh): whoever finds one puts it, all ask for all.
*/
#pragma once

#include "common.cuh"     // defines: warp_sum, share_of_squares, mbarrier_arrive
#include "hopper.cuh"     // defines: named_barrier_sync
#include "message.cuh"    // defines: ask, highest, put, put_back, UNWRITTEN
#include "wide_plan.cuh"  // defines: sizes, Arguments, Ring

namespace {

// 1 / rms of this block's share of the rows of x, by all spare warps: `thread` of SPARE_THREADS.
__device__ __forceinline__ void find_scales(const Arguments& a, int thread, float* warp_sums) {
    constexpr int BATCH = 8;  // loads under way: all, up to K of 6144
    for (int row = blockIdx.x; row < a.num_rows; row += gridDim.x) {
        const bf16* x = a.x + (int64_t)row * a.k;
        float sum = warp_sum(share_of_squares<SPARE_THREADS, BATCH>(x, a.k, thread));
        if (thread % 32 == 0) warp_sums[thread / 32] = sum;
        named_barrier_sync(SPARE_BARRIER, SPARE_THREADS);
        if (thread == 0) {
            sum = warp_sums[0];
#pragma unroll
            for (int warp = 1; warp < SPARE_WARPS; warp++) sum += warp_sums[warp];
            put(a.scales + row, rsqrtf(sum / a.k + a.eps));
        }
        named_barrier_sync(SPARE_BARRIER, SPARE_THREADS);  // for the next row
    }
}

// The scales of all rows, whoever found them, to shared memory: one warp of each block.
__device__ __forceinline__ void fetch_scales(
    const Arguments& a, const Ring& ring, float* row_scales) {
    constexpr int COUNT = (NUM_SCALES + 31) / 32;  // of rows, a lane
    const int lane = threadIdx.x & 31;
    float found[COUNT];
    uint32_t top;
    do {
        top = 0;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int row = lane + 32 * i;
            found[i] = row < a.num_rows ? ask(a.scales + row) : 1.0f;
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) top = max(top, highest(found[i]));
    } while (top == UNWRITTEN);
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (lane + 32 * i < NUM_SCALES) row_scales[lane + 32 * i] = found[i];
    mbarrier_arrive(ring.scaled);
    __syncwarp();
    // The last of all blocks puts them back.
    bool is_last = false;
    if (lane == 0) is_last = atomicInc(a.scales_used(), gridDim.x - 1) == gridDim.x - 1;
    if (!__shfl_sync(~0u, is_last, 0)) return;
    for (int row = lane; row < a.num_rows; row += 32) put_back(a.scales + row);
}

// Sums of tokens 8 * first_group and on become those of x / rms(x); never part of an fma with what is
// added, so that all variants give the same bits.
template <int COUNT>
__device__ __forceinline__ void scale(
    float (&sums)[COUNT], const float* row_scales, int first_group) {
    const float2* const pairs = (const float2*)row_scales + first_group * 4 + (threadIdx.x & 3);
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
        const float2 by = pairs[i];  // of tokens 2t, 2t + 1 of the group
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i + j] = __fmul_rn(sums[i + j], j & 1 ? by.y : by.x);
    }
}

}  // namespace
