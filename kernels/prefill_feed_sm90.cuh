/* The warps of attention_prefill_sm90.cu that feed, and what they share with those that compute.

   Shared memory: STAGES tiles of K and of V, two of Q, barriers, the mailbox. Tiles of K and V are
   [half][key][128 bytes], Q is [warpgroup][half][row][128 bytes], all in the 128B swizzle.

   Barriers, all mbarriers with a parity bit that flips each time a ring comes round:
     full_k, full_v [stage]   1 arrival + bytes   loader -> warpgroups
     empty_k, empty_v [stage] a warp each         warpgroups -> loader
     full_q [2] / empty_q [2] 2 warps / a warp each
     full_work / empty_work   1 / every reading warp

   The loader zeroes rows of V past context_len (P is 0 there, but 0 * NaN is not) and never copies
   them; such rows of K are masked. */
#pragma once

#include "common.cuh"         // defines: bf16, mbarrier_*, cp_async_16, fence_proxy_async
#include "hopper.cuh"         // defines: bulk_copy
#include "prefill_tiles.cuh"  // defines: PrefillTile, PrefillTiles, divide_by_group, group_inverse

namespace {

constexpr int WARPGROUPS = 2;  // that compute
constexpr int ROWS = 64 * WARPGROUPS;
constexpr int KEYS = 128;
constexpr int STAGES = 2;
constexpr int HALVES = HEAD_DIM / 64;
constexpr int HALF_BYTES = KEYS * 128;  // 64 dims of one K or V tile
constexpr int TILE_BYTES = HALVES * HALF_BYTES;
constexpr int Q_GROUP_BYTES = 64 * HEAD_DIM * 2;  // rows of one warpgroup
constexpr int Q_BYTES = WARPGROUPS * Q_GROUP_BYTES;
constexpr int PARTIAL_FLOATS = ROWS * (HEAD_DIM + 1);  // one split's O and log2-sum of each row
constexpr int CONSUMER_WARPS = 4 * WARPGROUPS;
constexpr int Q_WARPS = 2;

constexpr int AT_K = 0;
constexpr int AT_V = AT_K + STAGES * TILE_BYTES;
constexpr int AT_Q = AT_V + STAGES * TILE_BYTES;
constexpr int AT_BARRIERS = AT_Q + 2 * Q_BYTES;
constexpr int FULL_K = AT_BARRIERS;
constexpr int EMPTY_K = FULL_K + 8 * STAGES;
constexpr int FULL_V = EMPTY_K + 8 * STAGES;
constexpr int EMPTY_V = FULL_V + 8 * STAGES;
constexpr int FULL_Q = EMPTY_V + 8 * STAGES;
constexpr int EMPTY_Q = FULL_Q + 16;
constexpr int FULL_WORK = EMPTY_Q + 16;
constexpr int EMPTY_WORK = FULL_WORK + 8;
constexpr int AT_MAILBOX = EMPTY_WORK + 8;
static_assert(AT_MAILBOX % 16 == 0 && AT_MAILBOX + 32 <= AT_BARRIERS + 1024, "layout");

// A tile, or the part of its keys that one of several splits takes.
struct Work {
    PrefillTile tile;
    int split;
    int slot;  // place in the list of all tiles and splits
};

struct KeyTiles {
    int first, last;  // last < first: nothing for this split
};

__device__ __forceinline__ KeyTiles key_tiles_of(
    const Work& work, int num_splits, int group, uint32_t inverse) {
    const PrefillTile& tile = work.tile;
    const int last_row = min(tile.row + ROWS, tile.q_len * group) - 1;
    const int visible = tile.context - tile.q_len + divide_by_group(last_row, group, inverse) + 1;
    const int num = (visible + KEYS - 1) / KEYS;
    const int each = (num + num_splits - 1) / num_splits;
    return {work.split * each, min(num, (work.split + 1) * each) - 1};
}

// Reads the mailbox; `count` is how often this warp has read it before. The shuffles also tell the
// compiler that all lanes hold the same, so that loops and addresses use uniform registers.
__device__ __forceinline__ Work read_work(uint32_t base, const int* mailbox, int count) {
    mbarrier_wait(base + FULL_WORK, count & 1);
    int4 first = make_int4(0, 0, 0, 0), second = first;
    if ((threadIdx.x & 31) == 0) {
        first = *reinterpret_cast<const int4*>(mailbox);
        second = *reinterpret_cast<const int4*>(mailbox + 4);
        mbarrier_arrive(base + EMPTY_WORK);
    }
    Work work;
    work.tile = {__shfl_sync(~0u, first.x, 0), __shfl_sync(~0u, first.y, 0),
        __shfl_sync(~0u, first.z, 0), __shfl_sync(~0u, first.w, 0), __shfl_sync(~0u, second.x, 0),
        __shfl_sync(~0u, second.y, 0)};
    work.split = __shfl_sync(~0u, second.z, 0);
    work.slot = __shfl_sync(~0u, second.w, 0);
    return work;
}

// Where the rows of a tile lie in q and out, in elements: `first` plus a row's own offset.
struct RowOffsets {
    int64_t first;
    int token, stride, group;
    uint32_t inverse;

    __device__ __forceinline__ RowOffsets(
        const PrefillTile& tile, int num_kv_heads, int group, uint32_t inverse)
        : token(divide_by_group(tile.row, group, inverse)),
          stride(num_kv_heads * group * HEAD_DIM),
          group(group),
          inverse(inverse) {
        first = (int64_t)(tile.q_begin + token) * stride + tile.kv_head * group * HEAD_DIM;
    }

    __device__ __forceinline__ int of(int row) const {
        const int t = divide_by_group(row, group, inverse);
        return (t - token) * stride + (row - t * group) * HEAD_DIM;
    }
};

// ---- the warps that feed ----

__device__ __forceinline__ void schedule(uint32_t base, int* mailbox, const int* q_start,
    const int* context_lens, int first_seq, int num_seqs, int num_kv_heads, int group,
    int num_splits, int* workspace) {
    const int lane = threadIdx.x & 31;
    const uint32_t inverse = group_inverse(group);
    PrefillTiles<ROWS, HEAD_DIM * 4> tiles(
        q_start, context_lens, first_seq, num_seqs, group, num_kv_heads);
    int index = blockIdx.x;
    for (int count = 0;;) {
        const Work work = {tiles.find(index / num_splits), index % num_splits, index};
        bool empty = false;
        if (work.tile.sequence >= 0) {
            const KeyTiles keys = key_tiles_of(work, num_splits, group, inverse);
            empty = keys.last < keys.first;
        }
        if (!empty) {
            mbarrier_wait(base + EMPTY_WORK, (count & 1) ^ 1);
            count++;
            if (lane == 0) {
                *reinterpret_cast<int4*>(mailbox) = make_int4(
                    work.tile.sequence, work.tile.kv_head, work.tile.row, work.tile.q_begin);
                *reinterpret_cast<int4*>(mailbox + 4) =
                    make_int4(work.tile.q_len, work.tile.context, work.split, work.slot);
                mbarrier_arrive(base + FULL_WORK);
            }
        }
        if (work.tile.sequence < 0) break;
        if (lane == 0) index = gridDim.x + atomicAdd(workspace, 1);
        index = __shfl_sync(~0u, index, 0);
    }
    // The last block to end leaves the counters as it found them.
    if (lane == 0) {
        __threadfence();
        if (atomicAdd(workspace + 1, 1) == (int)gridDim.x - 1) {
            workspace[0] = 0;
            workspace[1] = 0;
        }
    }
}

__device__ __forceinline__ void load_kv(uint32_t base, char* shared, const int* mailbox,
    const char* kv, const int* seq_slots, const int* page_table, int table_stride, int page_size,
    int num_kv_heads, int group, int num_splits) {
    const int lane = threadIdx.x & 31;
    const int copy_rows = min(page_size, KEYS);
    const int parts = KEYS / copy_rows;
    const int part = lane % parts, half = lane / parts;  // what this lane copies, if half < HALVES
    const int page_shift = 31 - __clz(page_size);
    const uint32_t inverse = group_inverse(group);
    const int block_bytes = page_size * HEAD_DIM * 2;  // K or V of a page and head
    const int to = half * HALF_BYTES + part * copy_rows * 128;

    int stage = 0, parity = 1;
    for (int count = 0;; count++) {
        const Work work = read_work(base, mailbox, count);
        const PrefillTile& tile = work.tile;
        if (tile.sequence < 0) break;
        const KeyTiles key_tiles = key_tiles_of(work, num_splits, group, inverse);
        const int* pages = page_table + (int64_t)seq_slots[tile.sequence] * table_stride;
        const char* from_head = kv + tile.kv_head * 2 * block_bytes + half * page_size * 128;
        int key = key_tiles.last * KEYS;
        const int last_key = key_tiles.first * KEYS;  // the loop goes down
        int first = key + part * copy_rows;
        int page = half < HALVES && first < tile.context ? pages[first >> page_shift] : 0;
        for (; key >= last_key; key -= KEYS) {
            const int rows = half < HALVES ? min(copy_rows, tile.context - first) : 0;
            const char* from = from_head + (int64_t)(page * num_kv_heads) * (2 * block_bytes) +
                               (first & (page_size - 1)) * 128;
            first -= KEYS;
            if (half < HALVES && key > last_key) page = pages[first >> page_shift];
            const int tile_rows = min(KEYS, tile.context - key);

            mbarrier_wait(base + EMPTY_K + 8 * stage, parity);
            if (lane == 0) {
                mbarrier_arrive_expect(base + FULL_K + 8 * stage, tile_rows * HALVES * 128);
            }
            __syncwarp();
            if (rows > 0) {
                bulk_copy(base + AT_K + stage * TILE_BYTES + to, from, rows * 128,
                    base + FULL_K + 8 * stage);
            }

            mbarrier_wait(base + EMPTY_V + 8 * stage, parity);
            if (tile_rows < KEYS) {
                char* v = shared + AT_V + stage * TILE_BYTES;
                for (int i = tile_rows * 8 + lane; i < KEYS * 8; i += 32) {
#pragma unroll
                    for (int h = 0; h < HALVES; h++) {
                        *reinterpret_cast<uint4*>(v + h * HALF_BYTES + i * 16) =
                            make_uint4(0, 0, 0, 0);
                    }
                }
                fence_proxy_async();
                __syncwarp();
            }
            if (lane == 0) {
                mbarrier_arrive_expect(base + FULL_V + 8 * stage, tile_rows * HALVES * 128);
            }
            __syncwarp();
            if (rows > 0) {
                bulk_copy(base + AT_V + stage * TILE_BYTES + to, from + block_bytes, rows * 128,
                    base + FULL_V + 8 * stage);
            }
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
    }
}

__device__ __forceinline__ void load_q(
    uint32_t base, const int* mailbox, const bf16* q, int num_kv_heads, int group, int warp) {
    constexpr int CHUNKS = HALVES * 8;
    constexpr int STEP = 32 / CHUNKS;  // rows that the warp copies at a time
    const int lane = threadIdx.x & 31;
    const int chunk = lane % CHUNKS;
    const uint32_t inverse = group_inverse(group);
    for (int count = 0;; count++) {
        const PrefillTile tile = read_work(base, mailbox, count).tile;
        if (tile.sequence < 0) break;
        const int buffer = count & 1;
        const RowOffsets offsets(tile, num_kv_heads, group, inverse);
        const bf16* from = q + offsets.first + chunk * 8;
        mbarrier_wait(base + EMPTY_Q + 8 * buffer, ((count >> 1) & 1) ^ 1);
        for (int block = 32 * warp; block < ROWS; block += 32 * Q_WARPS) {
            const int offset = offsets.of(min(tile.row + block + lane, tile.q_len * group - 1));
            const uint32_t to = base + AT_Q + buffer * Q_BYTES + block / 64 * Q_GROUP_BYTES +
                                (chunk >> 3) * 8192 + (block & 32) * 128;
#pragma unroll 4
            for (int i = 0; i < 32; i += STEP) {
                const int row = i + lane / CHUNKS;
                cp_async_16(to + row * 128 + (((chunk ^ row) & 7) << 4),
                    from + __shfl_sync(~0u, offset, row));
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(base + FULL_Q + 8 * buffer);
    }
}

}  // namespace
