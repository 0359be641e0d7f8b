/* The two products of attention with wgmma alone, on one swizzled page: for the test beside it.

   One warpgroup. Block copies of K and V (page_size 128) go to shared memory as they lie in the
   page; scores = Q K^T [64, 128], output = P V [64, HEAD_DIM], both float32. */

#include "common.cuh"
#include "hopper.cuh"

constexpr int HALVES = HEAD_DIM / 64;
constexpr int TILE_BYTES = HALVES * 128 * 128;

extern "C" __global__ void __launch_bounds__(128, 1) wgmma_descriptors(const bf16* q,
    const bf16* p, const char* page, float* scores, float* output) {
    extern __shared__ __align__(1024) char shared[];
    const uint32_t base = shared_address(shared);
    const uint32_t at_v = base + TILE_BYTES, at_q = at_v + TILE_BYTES, barrier = at_q + TILE_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int g = lane / 4, t = lane & 3;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(barrier, 2 * TILE_BYTES);
        bulk_copy(base, page, 2 * TILE_BYTES, barrier);
    }
    for (int i = threadIdx.x; i < 64 * HEAD_DIM; i += 128) {
        const int row = i / HEAD_DIM, dim = i % HEAD_DIM;
        const int chunk = ((dim % 64 / 8) ^ (row & 7)) * 8;
        reinterpret_cast<bf16*>(shared + 2 * TILE_BYTES)[dim / 64 * 4096 + row * 64 + chunk +
            dim % 8] = q[i];
    }
    fence_proxy_async();
    __syncthreads();
    mbarrier_wait(barrier, 0);

    float s[64], o[HEAD_DIM / 2];
    for (int i = 0; i < HEAD_DIM / 2; i++) o[i] = 0.0f;
    uint32_t a[32];
#pragma unroll
    for (int k = 0; k < 8; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int row = warp * 16 + g + (i & 1) * 8, column = k * 16 + 2 * t + (i >> 1) * 8;
            a[4 * k + i] = *reinterpret_cast<const uint32_t*>(p + row * 128 + column);
        }
    }
    const uint32_t q_descriptor = matrix_descriptor(at_q, 16);
    const uint32_t k_descriptor = matrix_descriptor(base, 16);
    const uint32_t v_descriptor = matrix_descriptor(at_v, 128 * 128);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        const uint32_t q_step = q_descriptor + k / 4 * (8192 >> 4) + k % 4 * 2;
        const uint32_t k_step = k_descriptor + k / 4 * (16384 >> 4) + k % 4 * 2;
        if (k == 0) {
            wgmma_m64n128_ss<false>(s, q_step, k_step);
        } else {
            wgmma_m64n128_ss<true>(s, q_step, k_step);
        }
    }
#pragma unroll
    for (int k = 0; k < 8; k++) {
#if HEAD_DIM == 128
        wgmma_m64n128_rs(o, a + 4 * k, v_descriptor + k * (2048 >> 4));
#else
        wgmma_m64n64_rs(o, a + 4 * k, v_descriptor + k * (2048 >> 4));
#endif
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(s);
    pin(o);
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int row = warp * 16 + g + (i / 2 & 1) * 8, column = i / 4 * 8 + 2 * t + (i & 1);
        scores[row * 128 + column] = s[i];
        if (i < HEAD_DIM / 2) output[row * HEAD_DIM + column] = o[i];
    }
}
