/*
The new tokens of attention_decode: query, key and value as the product with W_qkv leaves them.

qkv has a row [num_q_heads + 2 num_kv_heads][HEAD_DIM] a sequence. What kv_store.cu does for the tokens
of prompts is done here, with the same roundings: the row scaled by 1 / rms of its row before the norm
and the bias added, RMSNorm a head, RoPE; the key and value go into their page.

- A lane has of a query head what the mma takes as B: dims 16k + 2t, + 1 and 16k + 8 + 2t, + 1. So the
  dims i and i + HEAD_DIM / 2, which rotate together, are in one lane, and the four lanes of a head
  join their sums of squares.
- A lane has of a key and a value dims 2l, 2l + 1 and those HEAD_DIM / 2 further. They go into their page
  and into the tile in shared memory, whose copy began before they were there (decode_feed.cuh).
*/
#pragma once

#include "common.cuh"       // defines: bf16 helpers, share_of_squares, kv_chunk_offset, quad_sum
#include "decode_tile.cuh"  // defines: K_STEPS, HEADS

constexpr int PAIRS = HEAD_DIM / 4;  // lanes that have something of a key

struct NewTokens {
    const bf16* qkv;
    const bf16 *q_norm, *k_norm;  // [HEAD_DIM]; null: no norm
    const float* rope_table;      // [position][HEAD_DIM]: cos, then sin
    const bf16* rows;             // [num_seqs][hidden] before their norm; null: qkv is scaled
    const bf16* bias;             // with rows; of a row of qkv, or null
    int num_q_heads, num_kv_heads, hidden;
    float eps, rows_eps;

    __device__ const bf16* row(int seq) const {
        return qkv + (int64_t)seq * (num_q_heads + 2 * num_kv_heads) * HEAD_DIM;
    }
};

// cos and sin of two neighbouring dims, rounded.
struct Angle {
    uint32_t cos, sin;

    __device__ __forceinline__ void load(const float* cosines) {
        const float2 c = load_before_wait((const float2*)cosines);
        const float2 s = load_before_wait((const float2*)(cosines + HEAD_DIM / 2));
        cos = pack_bf16(c.x, c.y), sin = pack_bf16(s.x, s.y);
    }
    __device__ __forceinline__ void rotate(uint32_t& low, uint32_t& high) const {
        const uint32_t old = low;
        low = add_bf16x2(mul_bf16x2(low, cos), mul_bf16x2(high, sin ^ 0x80008000u));
        high = add_bf16x2(mul_bf16x2(high, cos), mul_bf16x2(old, sin));
    }
};

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// 1 / rms of a sequence's row before its norm, by one warp. All of a row of 5,120 is asked for at once:
// each way to the memory takes some 3 us behind the copies of keys and values.
__device__ __forceinline__ float row_scale(const NewTokens& a, int seq) {
    const bf16* row = a.rows + (int64_t)seq * a.hidden;
    const float sum = share_of_squares<32, 20>(row, a.hidden, threadIdx.x % 32);
    return rsqrtf(warp_sum(sum) / a.hidden + a.rows_eps);
}

// What finishes a lane's dims of any query of a position. No kernel writes it.
struct QueryParts {
    Angle angles[K_STEPS / 2][2];
    uint32_t weight[K_STEPS][2];

    __device__ __forceinline__ void load(const NewTokens& a, int position) {
        const int t = threadIdx.x % 4;
        const float* row = a.rope_table + (int64_t)position * HEAD_DIM + 2 * t;
        const uint32_t* weights = (const uint32_t*)a.q_norm + t;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                weight[k][i] = a.q_norm ? load_before_wait(weights + 8 * k + 4 * i) : 0;
#pragma unroll
        for (int k = 0; k < K_STEPS / 2; k++)
#pragma unroll
            for (int i = 0; i < 2; i++) angles[k][i].load(row + 16 * k + 8 * i);
    }
};

// Makes of raw query heads (from `first_head` on) the ones to multiply with keys.
__device__ __forceinline__ void finish_query(
    uint32_t (&query)[HEAD_TILES][K_STEPS][2], const NewTokens& a, const QueryParts& parts,
    int first_head, int group, float scale) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) {
        uint32_t(&x)[K_STEPS][2] = query[n];
        if (a.rows && a.bias) {
            const bool has_bias = n * HEADS + g < group;
            const uint32_t* bias =
                (const uint32_t*)(a.bias + (first_head + n * HEADS + g) * HEAD_DIM) + t;
#pragma unroll
            for (int k = 0; k < K_STEPS; k++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    x[k][i] = scale_and_add(
                        x[k][i], scale, has_bias ? bias[8 * k + 4 * i] : MINUS_ZEROS);
        } else if (a.rows) {
#pragma unroll
            for (int k = 0; k < K_STEPS; k++)
#pragma unroll
                for (int i = 0; i < 2; i++) x[k][i] = scale_pair(x[k][i], scale);
        }
        if (a.q_norm) {
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < K_STEPS; k++)
                sum += squares_of(x[k][0]) + squares_of(x[k][1]);
            const float inverse = rsqrtf(quad_sum(sum) * (1.0f / HEAD_DIM) + a.eps);
#pragma unroll
            for (int k = 0; k < K_STEPS; k++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    x[k][i] = norm_pair(x[k][i], inverse, parts.weight[k][i]);
        }
#pragma unroll
        for (int k = 0; k < K_STEPS / 2; k++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                parts.angles[k][i].rotate(x[k][i], x[k + K_STEPS / 2][i]);
    }
}

// The key and value of a sequence's new token for one kv head, as one warp has them.
struct NewKeyValue {
    uint32_t key[2], value[2];
    uint32_t weight[2], k_bias[2], v_bias[2];
    Angle angle;

    __device__ __forceinline__ NewKeyValue() : key{0, 0}, value{0, 0}, weight{0, 0}, angle{0, 0} {
        k_bias[0] = k_bias[1] = v_bias[0] = v_bias[1] = MINUS_ZEROS;
    }

    // All that is read, at once.
    __device__ __forceinline__ void load(
        const NewTokens& a, int seq, int kv_head, int position) {
        const int lane = threadIdx.x % 32;
        if (lane >= PAIRS) return;
        const int k_row = (a.num_q_heads + kv_head) * HEAD_DIM / 2;
        const int v_row = k_row + a.num_kv_heads * HEAD_DIM / 2;
        const uint32_t* row = (const uint32_t*)a.row(seq) + lane;
        angle.load(a.rope_table + (int64_t)position * HEAD_DIM + 2 * lane);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            key[i] = __ldcg(row + k_row + i * PAIRS);
            value[i] = __ldcg(row + v_row + i * PAIRS);
            if (a.k_norm) weight[i] = ((const uint32_t*)a.k_norm)[lane + i * PAIRS];
            if (!a.bias) continue;
            k_bias[i] = ((const uint32_t*)a.bias)[k_row + lane + i * PAIRS];
            v_bias[i] = ((const uint32_t*)a.bias)[v_row + lane + i * PAIRS];
        }
    }

    // What was loaded becomes the key and value to keep.
    __device__ __forceinline__ void make(const NewTokens& a, float scale) {
        const int lane = threadIdx.x % 32;
        if (a.rows) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                key[i] = scale_and_add(key[i], scale, k_bias[i]);
                value[i] = scale_and_add(value[i], scale, v_bias[i]);
            }
        }
        if (a.k_norm) {
            const float sum = warp_sum(
                lane < PAIRS ? squares_of(key[0]) + squares_of(key[1]) : 0.0f);
            const float inverse = rsqrtf(sum * (1.0f / HEAD_DIM) + a.eps);
            key[0] = norm_pair(key[0], inverse, weight[0]);
            key[1] = norm_pair(key[1], inverse, weight[1]);
        }
        angle.rotate(key[0], key[1]);
    }

    // Into a page: `block` is that of the key, `row` the token's in it.
    __device__ __forceinline__ void store(uint8_t* block, int row, int page_size) const {
        const int lane = threadIdx.x % 32;
        if (lane >= PAIRS) return;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int pair = lane + i * PAIRS;
            uint8_t* to = block + kv_chunk_offset(row, pair / 4, page_size) + pair % 4 * 4;
            *(uint32_t*)to = key[i];
            *(uint32_t*)(to + page_size * HEAD_DIM * 2) = value[i];
        }
    }

    // Into a tile: `k` and `v` are the warp's rows of it, `row` the token's of those 16.
    __device__ __forceinline__ void patch(uint32_t k, uint32_t v, int half_bytes, int row) const {
        const int lane = threadIdx.x % 32;
        if (lane < PAIRS) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int pair = lane + i * PAIRS;
                const int at = pair / 32 * half_bytes + row * 128 +
                               ((pair / 4 % 8 ^ (row & 7)) << 4) + pair % 4 * 4;
                store_shared(k + at, key[i]);
                store_shared(v + at, value[i]);
            }
        }
#if HAS_BULK_COPY
        fence_proxy_async();  // the ring will be filled again
#endif
        __syncwarp();
    }
};
