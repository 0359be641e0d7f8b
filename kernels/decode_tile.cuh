/*
What attention_decode is made of: its sizes, its shared memory, and the attention of one warp over
16 tokens.
*/
#pragma once

#include "common.cuh"  // defines: bf16, ldmatrix, movmatrix_trans, mma_bf16, exp2_fast
#include "decode_plan.cuh"  // defines: TILE

constexpr int WARPS = 4;                   // consumers
constexpr int CONSUMERS = WARPS * 32;
constexpr int THREADS = CONSUMERS + (HAS_BULK_COPY ? 64 : 0);
constexpr int HALVES = HEAD_DIM / 64;
constexpr int PIECES = 2 * HALVES;         // (K|V, half) blocks of a page
constexpr int TOKEN_BYTES = HEAD_DIM * 4;  // K and V of one token of one head
constexpr int STAGE_BYTES = TILE * TOKEN_BYTES;
// 96 KB of stages and two blocks an SM where an SM has 228 KB; 64 KB where it has 164 (two) or 100. A
// cluster is launched with RING stages of 32 KB, and one block an SM if they are more than two.
constexpr bool LARGE_SHARED = __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200;
constexpr int BLOCKS_PER_SM = LARGE_SHARED || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870 ? 2 : 1;
#if CLUSTER > 1
constexpr int STAGES = RING * (128 / HEAD_DIM);
#else
constexpr int STAGES = (LARGE_SHARED ? 3 : 2) * (128 / HEAD_DIM);
#endif
constexpr int HEADS = 8;                   // columns of one mma
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int DIM_TILES = HEAD_DIM / 16;
constexpr bool PREFETCH_QUERY = HEAD_TILES == 1;  // the registers of two tiles leave no room
constexpr int DIM_QUADS = HEAD_DIM / 4;
constexpr int ROWS_AT_ONCE = 32 / DIM_QUADS;  // partial rows that a warp reads with 16 bytes a lane
constexpr int FEW_SPLITS = 8;                 // up to so many of a pair are merged the short way
// Parts of few splits, and rows of many, that are asked for together: as many as there are registers.
constexpr int SPLITS_AT_ONCE = HEAD_TILES == 1 ? 4 : 1;
constexpr int MERGE_LOADS = HEAD_TILES == 1 ? 8 : 4;

// 17 KB at HEAD_DIM 128: what is left beside the stages for two blocks an SM.
struct alignas(16) Shared {
    union {
        // The warps' O at the end of a segment; neither its writers nor its readers, with four dims
        // each, meet in a bank.
        float o[WARPS][HEADS][HEAD_DIM + 4];
        float merged[WARPS][HEAD_DIM];    // their shares of a merge
    };
    float max[2][WARPS][HEADS], sum[WARPS][HEADS];  // max: alternately, so one barrier less is due
    float merged_max[WARPS];
    float scale[STAGES];  // of the row of the sequence that a stage is of
    uint64_t full[STAGES], empty[STAGES];
    uint64_t received;  // all parts of other blocks of the cluster
};
static_assert(
    !LARGE_SHARED || CLUSTER > 1 || sizeof(Shared) + STAGES * STAGE_BYTES + 1024 <= 228 * 1024 / BLOCKS_PER_SM,
    "as many blocks as are launched would not run at once");

__device__ __forceinline__ void consumers_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

struct Accumulator {
    float o[HEAD_TILES][DIM_TILES][4];  // O^T: dims in rows, heads in columns
    float max[HEAD_TILES][2];           // heads 2t and 2t + 1, in base 2, of all lanes' tokens
    float sum[HEAD_TILES][2];           // the same, of this lane's tokens only

    __device__ void clear() {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
#pragma unroll
            for (int m = 0; m < DIM_TILES; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][m][i] = 0.0f;
            max[n][0] = max[n][1] = -INFINITY_F;
            sum[n][0] = sum[n][1] = 0.0f;
        }
    }
};

// Q^T as B fragments, straight from global memory; heads past the group are zero. From L2: beside a
// prefill nobody has waited, and the rows of the layer before lay in the same place.
__device__ __forceinline__ void load_query(
    uint32_t (&query)[HEAD_TILES][K_STEPS][2], const bf16* q, int group) {
    int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) {
        const uint32_t* row = (const uint32_t*)(q + (n * HEADS + g) * HEAD_DIM) + t;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) query[n][k][0] = query[n][k][1] = 0;
        if (n * HEADS + g >= group) continue;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            query[n][k][0] = __ldcg(row + k * 8);
            query[n][k][1] = __ldcg(row + k * 8 + 4);
        }
    }
}

// Adds 16 tokens, of which `valid` (1 .. 16) exist. k and v: shared addresses of their rows.
template <bool MASKED>
__device__ __forceinline__ void attend(
    Accumulator& acc, const uint32_t (&query)[HEAD_TILES][K_STEPS][2], uint32_t k, uint32_t v,
    int half_bytes, int valid, float scale) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float s[HEAD_TILES][2][4];
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][0][i] = s[n][1][i] = 0.0f;
    // K as A: matrices (tokens 0-7, 8-15) x (dims 0-7, 8-15). Two chains of products, for latency.
    uint32_t row = lane % 16;
    uint32_t k_row = k + row * 128, k_chunk = ((lane / 16) ^ (row & 7)) << 4;
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        uint32_t a[4];
        ldmatrix_x4(a, k_row + (step / 4) * half_bytes + (k_chunk ^ ((step % 4) << 5)));
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
            mma_bf16(s[n][step & 1], a, query[n][step][0], query[n][step][1]);
    }

    uint32_t p[HEAD_TILES][2];
    bool rescale = false;
    float alpha[HEAD_TILES][2];
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = (s[n][0][i] + s[n][1][i]) * scale;
            if (MASKED && g + (i / 2) * 8 >= valid) x[i] = -INFINITY_F;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float top = fmaxf(x[j], x[j + 2]);
#pragma unroll
            for (int offset = 4; offset < 32; offset <<= 1)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
            float updated = fmaxf(acc.max[n][j], top);
            alpha[n][j] = exp2_fast(acc.max[n][j] - updated);
            rescale |= acc.max[n][j] != updated;
            acc.max[n][j] = updated;
            x[j] = exp2_fast(x[j] - updated);
            x[j + 2] = exp2_fast(x[j + 2] - updated);
            acc.sum[n][j] = acc.sum[n][j] * alpha[n][j] + (x[j] + x[j + 2]);
        }
        p[n][0] = movmatrix_trans(pack_bf16(x[0], x[1]));
        p[n][1] = movmatrix_trans(pack_bf16(x[2], x[3]));
    }
    if (__any_sync(~0u, rescale)) {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
            for (int m = 0; m < DIM_TILES; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc.o[n][m][i] *= alpha[n][i & 1];
    }

    // V^T as A: matrices (dims 0-7, 8-15) x (tokens 0-7, 8-15), transposed on the way.
    row = lane % 8 + (lane / 16) * 8;
    uint32_t v_row = v + row * 128, v_chunk = (((lane / 8) & 1) ^ (row & 7)) << 4;
    uint32_t keep[2] = {~0u, ~0u};  // of tokens 2t, 2t + 1 and 2t + 8, 2t + 9
    if (MASKED) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = 2 * t + 8 * i;
            keep[i] = (token < valid ? 0xffffu : 0u) | (token + 1 < valid ? 0xffff0000u : 0u);
        }
    }
#pragma unroll
    for (int m = 0; m < DIM_TILES; m++) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, v_row + (m / 4) * half_bytes + (v_chunk ^ ((m % 4) << 5)));
        if (MASKED) {
            a[0] &= keep[0], a[1] &= keep[0];
            a[2] &= keep[1], a[3] &= keep[1];
        }
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) mma_bf16(acc.o[n][m], a, p[n][0], p[n][1]);
    }
}
