/*
kv_store: per-head RMSNorm of Q and K, RoPE, and K and V into the pages, in one pass over qkv.

Reads qkv [num_tokens, (num_heads + 2 num_kv_heads) * HEAD_DIM] bf16 once; writes q contiguous as
[num_tokens, num_heads * HEAD_DIM] and K, V straight into the swizzled pages (common.cuh). A lane
owns one 16-byte chunk (8 dims) of a head, HEAD_DIM / 8 lanes a head, so each half row of K or V is
one 128-byte store, and the partner of a rotation sits a fixed number of lanes away.

Rounding is that of the model in bf16 elsewhere: the norm in float, rounded, times the weight and
rounded again; cos and sin rounded to bf16; each product of the rotation and their sum rounded.
`rows` [num_tokens][hidden], if not null: qkv is the product of these rows before their norm, so it
is first scaled by their 1 / rms, `bias` (if not null, of a whole row of qkv) is added, and the sum
rounded.

A thread takes up to ITERATIONS heads of one token, so that a row of the table is read once for all
of them and their loads are in flight together.

Launch: grid (num_tokens, blocks) with at least ceil(heads / (ITERATIONS * HEADS_PER_PASS)) blocks,
more of them to spread few tokens over the device (heads = num_heads + 2 num_kv_heads); block 128,
no shared memory. -D HEAD_DIM (64 or 128), QK_NORM (0 or 1). May be launched with PDL: reads
positions, slots and the table before its wait.
*/
#include "common.cuh"  // defines: bf16 helpers, inverse_rms, scale_and_add, kv_*_offset, pdl_*

constexpr int THREADS = 128;
constexpr int LANES = HEAD_DIM / 8;  // lanes a head
constexpr int HEADS_PER_PASS = THREADS / LANES;
constexpr int ITERATIONS = 4;

// weight * round(x / rms(x)), rounded; the head's lanes are LANES neighbours of one warp.
__device__ __forceinline__ void rms_norm_head(uint32_t (&x)[4], uint4 weight, float eps) {
    const uint32_t w[4] = {weight.x, weight.y, weight.z, weight.w};
    float sum = squares_of(make_uint4(x[0], x[1], x[2], x[3]));
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1)
        sum += __shfl_xor_sync(~0u, sum, offset);
    float scale = rsqrtf(sum * (1.0f / HEAD_DIM) + eps);
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = norm_pair(x[i], scale, w[i]);
}

extern "C" __global__ void __launch_bounds__(THREADS) kv_store(
    const bf16* __restrict__ qkv, const bf16* __restrict__ q_norm, const bf16* __restrict__ k_norm,
    const float* __restrict__ rope_table, const int* __restrict__ positions,
    const int* __restrict__ kv_slots, bf16* __restrict__ q_out, uint8_t* __restrict__ kv,
    const bf16* rows, const bf16* __restrict__ bias, int num_heads, int num_kv_heads,
    int page_shift, int hidden, float eps, float rows_eps) {
    int token = blockIdx.x;
    int lane = threadIdx.x % LANES;
    int first_head = blockIdx.y * HEADS_PER_PASS + threadIdx.x / LANES;
    int stride = gridDim.y * HEADS_PER_PASS;
    int total_heads = num_heads + 2 * num_kv_heads;
    int position = load_before_wait(positions + token);
    int slot = load_before_wait(kv_slots + token);
#if QK_NORM
    uint4 q_weight = load_before_wait((const uint4*)q_norm + lane);
    uint4 k_weight = load_before_wait((const uint4*)k_norm + lane);
#endif

    // Half-split rotation: dim i pairs with i + HEAD_DIM / 2 and both use column i of the table.
    // The first of a pair takes minus the sine: its partner is rotated into it negated.
    const float4* cos_row =
        (const float4*)(rope_table + (int64_t)position * HEAD_DIM) + lane % (LANES / 2) * 2;
    const float4* sin_row = cos_row + HEAD_DIM / 8;
    const float4 cos_read[2] = {load_before_wait(cos_row), load_before_wait(cos_row + 1)};
    const float4 sin_read[2] = {load_before_wait(sin_row), load_before_wait(sin_row + 1)};

    pdl_wait();
    pdl_launch_dependents();
    uint4 loaded[ITERATIONS];
#pragma unroll
    for (int k = 0; k < ITERATIONS; k++) {
        int head = first_head + k * stride;
        loaded[k] = make_uint4(0, 0, 0, 0);
        if (head < total_heads)
            loaded[k] =
                *(const uint4*)(qkv + ((int64_t)token * total_heads + head) * HEAD_DIM + lane * 8);
    }

    if (rows) {
        const float scale = inverse_rms<THREADS>(rows + (int64_t)token * hidden, hidden, rows_eps);
#pragma unroll
        for (int k = 0; k < ITERATIONS; k++) {
            int head = first_head + k * stride;
            uint4 b = make_uint4(MINUS_ZEROS, MINUS_ZEROS, MINUS_ZEROS, MINUS_ZEROS);
            if (bias && head < total_heads)
                b = *(const uint4*)(bias + head * HEAD_DIM + lane * 8);
            loaded[k] = make_uint4(
                scale_and_add(loaded[k].x, scale, b.x), scale_and_add(loaded[k].y, scale, b.y),
                scale_and_add(loaded[k].z, scale, b.z), scale_and_add(loaded[k].w, scale, b.w));
        }
    }

    float sign = lane < LANES / 2 ? -1.0f : 1.0f;
    uint32_t cos[4], sin[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        cos[2 * i] = pack_bf16(cos_read[i].x, cos_read[i].y);
        cos[2 * i + 1] = pack_bf16(cos_read[i].z, cos_read[i].w);
        sin[2 * i] = pack_bf16(sign * sin_read[i].x, sign * sin_read[i].y);
        sin[2 * i + 1] = pack_bf16(sign * sin_read[i].z, sign * sin_read[i].w);
    }

#pragma unroll
    for (int k = 0; k < ITERATIONS; k++) {
        // The same for all the block, so the shuffles below have all lanes.
        if (blockIdx.y * HEADS_PER_PASS + k * stride >= total_heads) break;
        int head = first_head + k * stride;
        bool is_q = head < num_heads;
        bool is_v = head >= num_heads + num_kv_heads;
        uint32_t x[4] = {loaded[k].x, loaded[k].y, loaded[k].z, loaded[k].w};
        // Heads of several kinds may share a warp (a few small models): every lane computes the
        // rotation, and V heads keep what they read.
#if QK_NORM
        rms_norm_head(x, is_q ? q_weight : k_weight, eps);
#endif
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t partner = __shfl_xor_sync(~0u, x[i], LANES / 2);
            x[i] = add_bf16x2(mul_bf16x2(x[i], cos[i]), mul_bf16x2(partner, sin[i]));
        }
        if (head >= total_heads) continue;
        uint4 result = is_v ? loaded[k] : make_uint4(x[0], x[1], x[2], x[3]);
        if (is_q) {
            *(uint4*)(q_out + ((int64_t)token * num_heads + head) * HEAD_DIM + lane * 8) = result;
        } else if (slot >= 0) {
            int kv_head = head - num_heads - (is_v ? num_kv_heads : 0);
            int page_size = 1 << page_shift;
            uint8_t* block = kv + kv_block_offset(slot >> page_shift, kv_head, is_v, num_kv_heads,
                                                  page_size, HEAD_DIM);
            *(uint4*)(block + kv_chunk_offset(slot & (page_size - 1), lane, page_size)) = result;
        }
    }
}
