/*
kv_store: per-head RMSNorm of Q and K, RoPE, and K and V into the pages, in one pass over qkv.

Reads qkv [num_tokens, (num_heads + 2 num_kv_heads) * HEAD_DIM] bf16 once; writes q contiguous as
[num_tokens, num_heads * HEAD_DIM] and K, V straight into the swizzled pages (common.cuh). A lane
owns one 16-byte chunk (8 dims) of a head, HEAD_DIM / 8 lanes a head, so each half row of K or V is
one 128-byte store, and the partner of a rotation sits a fixed number of lanes away.

Rounding is that of the model in bf16 elsewhere: the norm in float, rounded, times the weight and
rounded again; cos and sin rounded to bf16; each product of the rotation and their sum rounded.

Launch: grid (num_tokens, ceil(heads / (2048 / HEAD_DIM))) with heads = num_heads + 2 num_kv_heads,
block 256, no shared memory. -D HEAD_DIM (64 or 128), QK_NORM (0 or 1). May be launched with PDL.
*/
#include "common.cuh"  // defines: bf16 helpers, kv_block_offset, kv_chunk_offset, pdl_*

constexpr int THREADS = 256;
constexpr int LANES = HEAD_DIM / 8;             // lanes a head
constexpr int HEADS_PER_BLOCK = THREADS / LANES;

// x = weight * round(x / rms(x)), rounded; the head's lanes are LANES neighbours of one warp.
__device__ __forceinline__ void rms_norm_head(float (&x)[8], const bf16* weight, float eps) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i] * x[i];
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset >>= 1)
        sum += __shfl_xor_sync(~0u, sum, offset);
    float scale = rsqrtf(sum * (1.0f / HEAD_DIM) + eps);
    uint4 packed = *(const uint4*)weight;
    const uint32_t w[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = round_bf16(round_bf16(x[2 * i] * scale) * bf16_low(w[i]));
        x[2 * i + 1] = round_bf16(round_bf16(x[2 * i + 1] * scale) * bf16_high(w[i]));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) kv_store(
    const bf16* __restrict__ qkv, const bf16* __restrict__ q_norm, const bf16* __restrict__ k_norm,
    const float* __restrict__ rope_table, const int* __restrict__ positions,
    const int* __restrict__ kv_slots, bf16* __restrict__ q_out, uint8_t* __restrict__ kv,
    int num_heads, int num_kv_heads, int page_size, float eps) {
    int token = blockIdx.x;
    int lane = threadIdx.x % LANES;
    int head = blockIdx.y * HEADS_PER_BLOCK + threadIdx.x / LANES;
    int total_heads = num_heads + 2 * num_kv_heads;
    bool exists = head < total_heads;
    bool is_q = head < num_heads;
    bool is_v = head >= num_heads + num_kv_heads;

    int position = positions[token];
    int slot = kv_slots[token];
    // Half-split rotation: dim i pairs with i + HEAD_DIM / 2 and both use column i of the table.
    const float* cos_row = rope_table + (int64_t)position * HEAD_DIM + (lane % (LANES / 2)) * 8;
    float cos[8], sin[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        *(float4*)&cos[i] = *(const float4*)(cos_row + i);
        *(float4*)&sin[i] = *(const float4*)(cos_row + HEAD_DIM / 2 + i);
    }

    pdl_wait();
    uint4 packed = make_uint4(0, 0, 0, 0);
    if (exists)
        packed = *(const uint4*)(qkv + ((int64_t)token * total_heads + head) * HEAD_DIM + lane * 8);
    uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};

    // Heads of several kinds may share a warp (a few small models), and shuffles need all its lanes:
    // every lane computes the rotation and V heads keep what they read.
    float x[8];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = bf16_low(pairs[i]);
        x[2 * i + 1] = bf16_high(pairs[i]);
    }
#if QK_NORM
    rms_norm_head(x, (is_q ? q_norm : k_norm) + lane * 8, eps);
#endif
    float sign = lane < LANES / 2 ? -1.0f : 1.0f;
    uint32_t rotated[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float result[2];
        uint32_t mine = pack_bf16(x[2 * i], x[2 * i + 1]);
        uint32_t partner = __shfl_xor_sync(~0u, mine, LANES / 2);
        const float other[2] = {bf16_low(partner), bf16_high(partner)};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float straight = round_bf16(x[2 * i + j] * round_bf16(cos[2 * i + j]));
            float crossed = round_bf16(sign * other[j] * round_bf16(sin[2 * i + j]));
            result[j] = straight + crossed;
        }
        rotated[i] = pack_bf16(result[0], result[1]);
    }
    pdl_launch_dependents();
    if (!exists) return;
    uint4 out = is_v ? packed : make_uint4(rotated[0], rotated[1], rotated[2], rotated[3]);
    if (is_q) {
        *(uint4*)(q_out + ((int64_t)token * num_heads + head) * HEAD_DIM + lane * 8) = out;
    } else if (slot >= 0) {
        int kv_head = head - num_heads - (is_v ? num_kv_heads : 0);
        uint8_t* block = kv + kv_block_offset(
            slot / page_size, kv_head, is_v, num_kv_heads, page_size, HEAD_DIM);
        *(uint4*)(block + kv_chunk_offset(slot % page_size, lane, page_size)) = out;
    }
}
