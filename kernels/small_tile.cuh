/*
What gemm_small is made of: its sizes, its arguments, and what a lane does with a chunk of W, of x or of
the sums.
*/
#pragma once

#include "common.cuh"  // defines: bf16, mma_bf16, cp_async_wait

constexpr int STEP_K = 64;
constexpr int STEP_BYTES = ROW_TILES * 16 * STEP_K * 2;  // of W, a warp and step
constexpr int QUADS = ROW_TILES * N_TILES * 32;          // float4 sums of a tile: one lane's D
constexpr int ROWS = N_TILES * 8;                        // slots for rows of x
constexpr int MAX_WARPS = 8;

struct Arguments {
    bf16* out;
    const bf16* x;
    const bf16* weight;
    const bf16* bias;
    const bf16* residual;
    int num_rows, n, k, normed, gated, stages, early;
    float eps;
};

__device__ __forceinline__ void copy_weight(uint32_t shared, const bf16* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global)
                 : "memory");
}

// At most `pending` groups of copies outstanding; the count is the same for a whole launch.
__device__ __forceinline__ void wait_copies(int pending) {
    switch (pending) {
        case 0: cp_async_wait<0>(); break;
        case 1: cp_async_wait<1>(); break;
        case 2: cp_async_wait<2>(); break;
        case 3: cp_async_wait<3>(); break;
        case 4: cp_async_wait<4>(); break;
        case 5: cp_async_wait<5>(); break;
        case 6: cp_async_wait<6>(); break;
        default: cp_async_wait<7>(); break;
    }
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// A value that is computed here, before a wait, and not where it is first used.
__device__ __forceinline__ void keep(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void keep(bf16*& x) { asm volatile("" : "+l"(x)); }

// Through a pointer of which the compiler no longer knows that it is a global one.
__device__ __forceinline__ void store_global(bf16* to, bf16 x) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(to), "h"(x) : "memory");
}
__device__ __forceinline__ void store_global(bf16* to, uint32_t pair) {
    asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(pair) : "memory");
}

// d += W x^T of 32 neighbours of K: 8 a lane, of rows g (top) and g + 8 of W and row g of x.
__device__ __forceinline__ void multiply(float (&d)[4], uint4 top, uint4 bottom, uint4 x) {
    mma_bf16(d, {top.x, bottom.x, top.y, bottom.y}, x.x, x.y);
    mma_bf16(d, {top.z, bottom.z, top.w, bottom.w}, x.z, x.w);
}

// Of COUNT neighbours, in their order.
template <int COUNT>
__device__ __forceinline__ float sum_of(const float* rows, int row) {
    struct alignas(COUNT > 2 ? 16 : 8) Row {
        float parts[COUNT];
    };
    const Row parts = ((const Row*)rows)[row];
    float sum = parts.parts[0];
#pragma unroll
    for (int i = 1; i < COUNT; i++) sum += parts.parts[i];
    return sum;
}

// What one lane copies: row slots g and g + 8 of every 16-row tile of a block's tile.
struct Rows {
    uint32_t first[ROW_TILES];  // in elements of W
    uint32_t to_second;

    __device__ __forceinline__ void set(const Arguments& a, int tile, int offset) {
        const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const int tile16 = tile * ROW_TILES + r;
            // Rows past the end are read from the last ones, and their sums dropped.
            const int row = a.gated ? min(tile16 * 8 + g, a.n / 2 - 1)
                                    : min(tile16 * 16 + 2 * g, a.n - 2);
            first[r] = (uint32_t)row * a.k + offset;
        }
        to_second = a.gated ? (uint32_t)(a.n / 2) * a.k : a.k;
    }
};
