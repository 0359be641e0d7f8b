/*
out = silu(gate) * up, the middle of the MLP. gate_up is [num_rows][2 * width]: gate, then up.

16 bytes of each a thread. Rounding as transformers: silu in float, rounded to bf16, times up.

Launch: grid (num_rows, ceil(width / 8 / block)), any block, width a multiple of 8.
Programmatic dependent launch is allowed.
*/
#include "common.cuh"  // defines: bf16, pack_bf16, round_bf16, exp2_fast, pdl_wait

__device__ __forceinline__ float silu(float x) { return x / (1.0f + exp2_fast(-x * LOG2E)); }

__device__ __forceinline__ uint32_t silu_mul_pair(uint32_t gate, uint32_t up) {
    return pack_bf16(
        round_bf16(silu(bf16_low(gate))) * bf16_low(up),
        round_bf16(silu(bf16_high(gate))) * bf16_high(up));
}

extern "C" __global__ void silu_mul(bf16* out, const bf16* gate_up, int width) {
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    pdl_wait();
    pdl_launch_dependents();
    if (column >= width) return;
    const bf16* row = gate_up + (int64_t)blockIdx.x * 2 * width + column;
    const uint4 gate = *(const uint4*)row;
    const uint4 up = *(const uint4*)(row + width);
    *(uint4*)(out + (int64_t)blockIdx.x * width + column) = make_uint4(
        silu_mul_pair(gate.x, up.x), silu_mul_pair(gate.y, up.y),
        silu_mul_pair(gate.z, up.z), silu_mul_pair(gate.w, up.w));
}
