/* How the output of a tile leaves attention_prefill_sm90.cu: to `out`, or as the part of one split,
   which attention_prefill_combine joins with the others.

   A part is PARTIAL_FLOATS float32: O [ROWS][HEAD_DIM], normalised as if there were no other keys,
   then the log2 of each row's sum of exponentials [ROWS], with the row's maximum in it. The weight
   of a part in a row is 2^(its log2-sum), relative to the largest of them.

   A warpgroup holds its O as wgmma leaves it: a warp has 16 rows, lane 4g+t has dims 2t and 2t+1 of
   every 8 dims of rows g and g + 8. */
#pragma once

#include "common.cuh"             // defines: bf16, pack_bf16, quad_sum
#include "prefill_feed_sm90.cuh"  // defines: layout of Q, RowOffsets
#include "prefill_tiles.cuh"      // defines: PrefillTile

namespace {

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// One split's part of a tile: O divided by its sum, then log2 of the sum with the maximum in it. A
// row that sees none of the split's keys gets zeros and -inf.
__device__ __forceinline__ void store_partial(const float (&o)[HEAD_DIM / 2],
    const float (&row_max)[2], const float (&row_sum)[2], float scale_log2, float* partial,
    int row) {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float sum = quad_sum(row_sum[r]);
        const float inverse_sum = sum == 0.0f ? 0.0f : reciprocal(sum);
        float* to = partial + (row + g + 8 * r) * HEAD_DIM + 2 * t;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i++) {
            *reinterpret_cast<float2*>(to + 8 * i) =
                make_float2(o[4 * i + 2 * r] * inverse_sum, o[4 * i + 2 * r + 1] * inverse_sum);
        }
        if (t == 0) {
            partial[ROWS * HEAD_DIM + row + g + 8 * r] =
                sum == 0.0f ? -INFINITY_F : row_max[r] * scale_log2 + log2_fast(sum);
        }
    }
}

// Normalises O and writes it through `rows`: this warp's 16 rows of Q, which no product reads now.
__device__ __forceinline__ void store_output(const float (&o)[HEAD_DIM / 2],
    const float (&row_sum)[2], char* rows, bf16* out, const PrefillTile& tile, int warp_row,
    int num_kv_heads, int group, uint32_t inverse) {
    const int lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float inverse_sum = reciprocal(quad_sum(row_sum[r]));
        char* row = rows + (g + 8 * r) * 128 + 4 * t;
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; i++) {
            *reinterpret_cast<uint32_t*>(row + (i >> 3) * 8192 + (((i ^ g) & 7) << 4)) =
                pack_bf16(o[4 * i + 2 * r] * inverse_sum, o[4 * i + 2 * r + 1] * inverse_sum);
        }
    }
    __syncwarp();
    constexpr int CHUNKS = HALVES * 8;
    const int chunk = lane % CHUNKS;
    const RowOffsets offsets(tile, num_kv_heads, group, inverse);
    const int offset = offsets.of(warp_row + (lane & 15));
    const int num_rows = tile.q_len * group;
    bf16* to = out + offsets.first + chunk * 8;
#pragma unroll
    for (int i = 0; i < 16; i += 32 / CHUNKS) {
        const int row = i + lane / CHUNKS;
        const uint4 x = *reinterpret_cast<const uint4*>(
            rows + (chunk >> 3) * 8192 + row * 128 + (((chunk ^ row) & 7) << 4));
        const int at = __shfl_sync(~0u, offset, row);
        if (warp_row + row < num_rows) *reinterpret_cast<uint4*>(to + at) = x;
    }
    __syncwarp();
}

}  // namespace
