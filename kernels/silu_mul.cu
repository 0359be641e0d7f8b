/*
out = silu(gate) * up, the middle of the MLP. gate_up is [num_rows][2 * width]: gate, then up.

16 bytes of each a thread and turn. Rounding as transformers: silu in float, rounded to bf16, times
up. `rows` [num_rows][hidden], if not null: gate_up is the product of these rows before their norm,
so it is scaled by their 1 / rms first, and rounded.

Launch: grid (num_rows, any number of blocks: they share the columns), block 128, width and hidden
multiples of 8. Programmatic dependent launch is allowed.
*/
#include "common.cuh"  // defines: bf16, pack_bf16, round_bf16, silu, inverse_rms, pdl_wait

constexpr int THREADS = 128;

__device__ __forceinline__ uint32_t silu_mul_pair(uint32_t gate, uint32_t up, float scale) {
    if (scale != 1.0f) gate = scale_pair(gate, scale), up = scale_pair(up, scale);
    return pack_bf16(
        round_bf16(silu(bf16_low(gate))) * bf16_low(up),
        round_bf16(silu(bf16_high(gate))) * bf16_high(up));
}

extern "C" __global__ void __launch_bounds__(THREADS) silu_mul(
    bf16* out, const bf16* gate_up, const bf16* rows, int width, int hidden, float eps) {
    pdl_wait();
    pdl_launch_dependents();
    const bf16* row = gate_up + (int64_t)blockIdx.x * 2 * width;
    // Always one turn's loads ahead; the first are under way while the row's scale is found.
    uint4 gate = make_uint4(0, 0, 0, 0), up = gate;
    auto load = [&](int column) {
        if (column >= width) return;
        gate = *(const uint4*)(row + column);
        up = *(const uint4*)(row + width + column);
    };
    const int stride = gridDim.y * THREADS * 8;
    int column = (blockIdx.y * THREADS + threadIdx.x) * 8;
    load(column);
    const float scale =
        rows ? inverse_rms<THREADS>(rows + (int64_t)blockIdx.x * hidden, hidden, eps) : 1.0f;
    for (; column < width; column += stride) {
        const uint4 g = gate, u = up;
        load(column + stride);
        *(uint4*)(out + (int64_t)blockIdx.x * width + column) = make_uint4(
            silu_mul_pair(g.x, u.x, scale), silu_mul_pair(g.y, u.y, scale),
            silu_mul_pair(g.z, u.z, scale), silu_mul_pair(g.w, u.w, scale));
    }
}
