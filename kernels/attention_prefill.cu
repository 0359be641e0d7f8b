/* Prefill attention over KV pages with mma.sync: every device from sm_80 on, head_dim 64 and 128.

   Ragged and causal: token r of a sequence with q_len new tokens and context_len keys sees keys
   0 .. context_len - q_len + r. Keys and values come from the pages alone (this step's were written
   there before), so cached prefixes and chunks are the same case. Hopper has its own kernel in
   attention_prefill_sm90.cu; this one is the reference for it and the path of all other devices.

   One block computes one tile of prefill_tiles.cuh: 128 packed rows, 8 warps of 16 rows, each with
   its rows of Q in registers as A fragments. Tiles of 64 keys and values go to shared memory by
   cp.async, two stages, as they lie in the pages (128-byte rows, chunks swizzled), which ldmatrix
   reads without bank conflicts. The softmax is online in base 2, in float32; P is rounded to bf16.
   Keys past context_len are filled with zeros, never read: a page may hold anything there.

   Launch: grid = upper bound of the number of tiles, (num_tokens * group + num_seqs * 127) / 128 *
   num_kv_heads; block = 256; shared memory = 4 * 64 * HEAD_DIM * 2 bytes.
   -D HEAD_DIM (64, 128). page_size: 16 .. 256, a power of two. */

#include "common.cuh"  // defines: bf16, ldmatrix_x4, mma_bf16, cp_async_16_or_zero, pack_bf16
#include "prefill_tiles.cuh"  // defines: PrefillTile, PrefillTiles, divide_by_group, group_inverse

namespace {

constexpr int WARPS = 8;
constexpr int ROWS = 16 * WARPS;
constexpr int KEYS = 64;
constexpr int HALVES = HEAD_DIM / 64;
constexpr int TILE_BYTES = KEYS * HEAD_DIM * 2;
constexpr int HALF_BYTES = KEYS * 128;

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace

// q [num_tokens, Hq, HEAD_DIM], out [num_tokens, Hq * HEAD_DIM]; kv: one layer's pages;
// page_table int32 [.., table_stride]; sequences first_seq .. first_seq + num_seqs - 1 of the step.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) attention_prefill(
    const bf16* __restrict__ q, const char* __restrict__ kv, bf16* __restrict__ out,
    const int* __restrict__ q_start, const int* __restrict__ context_lens,
    const int* __restrict__ seq_slots, const int* __restrict__ page_table, int first_seq,
    int num_seqs, int num_kv_heads, int group, int table_stride, int page_size, float scale) {
    extern __shared__ __align__(1024) char shared[];
    const uint32_t shared_k = shared_address(shared);
    const uint32_t shared_v = shared_k + 2 * TILE_BYTES;
    const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    const int g = lane / 4, t = lane & 3;

    pdl_wait();
    pdl_launch_dependents();  // not before the wait: attention_decode relies on it
    PrefillTiles<ROWS, HEAD_DIM * 4> tiles(
        q_start, context_lens, first_seq, num_seqs, group, num_kv_heads);
    const PrefillTile tile = tiles.find(blockIdx.x);
    if (tile.sequence < 0) return;

    const uint32_t inverse = group_inverse(group);
    const int num_rows = tile.q_len * group;
    const int cached = tile.context - tile.q_len;
    const int last_row = min(tile.row + ROWS, num_rows) - 1;
    const int visible = cached + divide_by_group(last_row, group, inverse) + 1;
    const int num_key_tiles = (visible + KEYS - 1) / KEYS;

    const int* pages = page_table + (int64_t)seq_slots[tile.sequence] * table_stride;
    const int page_shift = 31 - __clz(page_size);
    const int block_bytes = page_size * HEAD_DIM * 2;  // K or V of a page and head
    const char* kv_of_head = kv + tile.kv_head * 2 * block_bytes;

    // One tile of K and V into a stage: row and chunk as they lie in the page.
    auto load = [&](int key_tile, int stage) {
        constexpr int CHUNKS = KEYS * HALVES * 8;
#pragma unroll
        for (int i = threadIdx.x; i < CHUNKS; i += 32 * WARPS) {
            const int chunk = i & 7, row = (i >> 3) % KEYS, half = (i >> 3) / KEYS;
            const int key = key_tile * KEYS + row;
            const bool valid = key < tile.context;
            const int page = valid ? pages[key >> page_shift] : 0;
            const char* from = kv_of_head + (int64_t)(page * num_kv_heads) * (2 * block_bytes) +
                               half * page_size * 128 + (key & (page_size - 1)) * 128 + chunk * 16;
            const uint32_t to = stage * TILE_BYTES + half * HALF_BYTES + row * 128 + chunk * 16;
            cp_async_16_or_zero(shared_k + to, from, valid);
            cp_async_16_or_zero(shared_v + to, from + block_bytes, valid);
        }
        cp_async_commit();
    };

    load(num_key_tiles - 1, 0);

    // Rows g and g + 8 of the warp: A fragments of Q straight from global memory.
    uint32_t q_fragments[HEAD_DIM / 16][4];
    int limit[2];  // last key that the row sees
    int64_t offset[2];
    bool stored[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = tile.row + warp * 16 + g + 8 * i;
        stored[i] = row < num_rows;
        const int packed = min(row, num_rows - 1);
        const int token = divide_by_group(packed, group, inverse);
        limit[i] = cached + token;
        offset[i] = ((int64_t)(tile.q_begin + token) * num_kv_heads * group + tile.kv_head * group +
                        packed - token * group) *
                    HEAD_DIM;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(q + offset[i]) + t;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            q_fragments[k][i] = from[k * 8];
            q_fragments[k][i + 2] = from[k * 8 + 4];
        }
    }

    float o[HEAD_DIM / 8][4] = {};
    float row_max[2] = {-INFINITY_F, -INFINITY_F}, row_sum[2] = {0.0f, 0.0f};
    const float scale_log2 = scale * LOG2E;
    const int matrix = lane / 8, in_matrix = lane & 7;

    for (int key_tile = num_key_tiles - 1, stage = 0; key_tile >= 0; key_tile--, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        if (key_tile > 0) load(key_tile - 1, stage ^ 1);

        // S = Q K^T: matrices 0, 1 are dims k and k + 8 on of keys n on; 2, 3 those of keys n + 8.
        float s[KEYS / 8][4] = {};
        const uint32_t k_tile = shared_k + stage * TILE_BYTES;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                const int key = n * 16 + (matrix >> 1) * 8 + in_matrix;
                const int chunk = (k & 3) * 2 + (matrix & 1);
                uint32_t b[4];
                ldmatrix_x4(
                    b, k_tile + (k >> 2) * HALF_BYTES + key * 128 + ((chunk ^ in_matrix) << 4));
                mma_bf16(s[2 * n], q_fragments[k], b[0], b[1]);
                mma_bf16(s[2 * n + 1], q_fragments[k], b[2], b[3]);
            }
        }

        const int first_key = key_tile * KEYS;
        if (first_key + KEYS - 1 > min(limit[0], limit[1])) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (first_key + n * 8 + 2 * t + (i & 1) > limit[i >> 1]) s[n][i] = -INFINITY_F;
                }
            }
        }

#pragma unroll
        for (int i = 0; i < 2; i++) {
            float highest = row_max[i];
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                highest = fmaxf(highest, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
            }
            highest = quad_max(highest);
            const float shift = highest == -INFINITY_F ? 0.0f : highest * scale_log2;
            const float rescale = exp2_fast(row_max[i] * scale_log2 - shift);
            row_max[i] = highest;
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++) {
                s[n][2 * i] = exp2_fast(s[n][2 * i] * scale_log2 - shift);
                s[n][2 * i + 1] = exp2_fast(s[n][2 * i + 1] * scale_log2 - shift);
                sum += s[n][2 * i] + s[n][2 * i + 1];
            }
            row_sum[i] = row_sum[i] * rescale + sum;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++) {
                o[d][2 * i] *= rescale;
                o[d][2 * i + 1] *= rescale;
            }
        }

        // O += P V: matrices 0, 1 are keys k and k + 8 on of dims d on; 2, 3 those of dims d + 8.
        const uint32_t v_tile = shared_v + stage * TILE_BYTES;
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            const uint32_t p[4] = {pack_bf16(s[2 * k][0], s[2 * k][1]),
                pack_bf16(s[2 * k][2], s[2 * k][3]), pack_bf16(s[2 * k + 1][0], s[2 * k + 1][1]),
                pack_bf16(s[2 * k + 1][2], s[2 * k + 1][3])};
            const int key = k * 16 + (matrix & 1) * 8 + in_matrix;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 16; d++) {
                const int chunk = (d & 3) * 2 + (matrix >> 1);
                uint32_t b[4];
                ldmatrix_x4_trans(
                    b, v_tile + (d >> 2) * HALF_BYTES + key * 128 + ((chunk ^ in_matrix) << 4));
                mma_bf16(o[2 * d], p, b[0], b[1]);
                mma_bf16(o[2 * d + 1], p, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float inverse_sum = 1.0f / quad_sum(row_sum[i]);
        if (stored[i]) {
            uint32_t* to = reinterpret_cast<uint32_t*>(out + offset[i]) + t;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++) {
                to[d * 4] = pack_bf16(o[d][2 * i] * inverse_sum, o[d][2 * i + 1] * inverse_sum);
            }
        }
    }
}
