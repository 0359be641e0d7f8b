/*
RMSNorm over rows of bf16, alone or with the residual addition before it.

    rms_norm      out = norm(x)
    add_rms_norm  residual = x + residual (rounded to bf16, in place); out = norm(residual)

One block per row, 8 values (16 bytes) a thread, the row stays in registers between its two uses:
each value is read once and written once. The rounding is that of transformers: the sum of squares
and the scaling in float, rounded to bf16, then multiplied by the weight and rounded again.

Launch: grid (num_rows), block hidden / 8 rounded up to a warp, hidden <= 8192 and a multiple of 8.
Programmatic dependent launch is allowed: the weight, which no kernel writes, is read before the wait.
*/
#include "common.cuh"  // defines: bf16, warp_sum, pdl_wait, pdl_launch_dependents

__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[32];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = lane < (blockDim.x >> 5) ? partial[lane] : 0.0f;
    return warp_sum(x);
}

template <bool ADD>
__device__ __forceinline__ void norm_row(
    bf16* out, const bf16* x, bf16* residual, const bf16* weight, int hidden, float eps) {
    const int column = threadIdx.x * 8;
    const int64_t offset = (int64_t)blockIdx.x * hidden + column;
    const bool inside = column < hidden;
    uint4 w = make_uint4(0, 0, 0, 0), v = w;
    if (inside) w = *(const uint4*)(weight + column);
    pdl_wait();
    float values[8];
    if (inside) v = *(const uint4*)(x + offset);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = bf16_low(pairs[i]);
        values[2 * i + 1] = bf16_high(pairs[i]);
    }
    if (ADD && inside) {
        const uint4 r = *(const uint4*)(residual + offset);
        const uint32_t old[4] = {r.x, r.y, r.z, r.w};
        uint32_t sum[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum[i] = pack_bf16(values[2 * i] + bf16_low(old[i]), values[2 * i + 1] + bf16_high(old[i]));
            values[2 * i] = bf16_low(sum[i]);
            values[2 * i + 1] = bf16_high(sum[i]);
        }
        *(uint4*)(residual + offset) = make_uint4(sum[0], sum[1], sum[2], sum[3]);
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += values[i] * values[i];
    const float scale = rsqrtf(block_sum(squares) / hidden + eps);
    pdl_launch_dependents();
    if (!inside) return;
    const uint32_t scales[4] = {w.x, w.y, w.z, w.w};
    uint32_t result[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        result[i] = pack_bf16(
            round_bf16(values[2 * i] * scale) * bf16_low(scales[i]),
            round_bf16(values[2 * i + 1] * scale) * bf16_high(scales[i]));
    }
    *(uint4*)(out + offset) = make_uint4(result[0], result[1], result[2], result[3]);
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm(bf16* out, const bf16* x, const bf16* weight, int hidden, float eps) {
    norm_row<false>(out, x, nullptr, weight, hidden, eps);
}

extern "C" __global__ void __launch_bounds__(1024)
add_rms_norm(bf16* out, const bf16* x, bf16* residual, const bf16* weight, int hidden, float eps) {
    norm_row<true>(out, x, residual, weight, hidden, eps);
}
