/*
What feeds the consumers of attention_decode: where keys and values lie, and who brings them.

A stage holds the tile's pages, or its part of a larger page, one after the other, each as it lies in
memory: [K|V][half][rows][128 bytes] with rows = min(page size, TILE).

- sm_90 and newer: two warps walk the block's stretch beside the consumers. One copies every tile into
  the ring, without the row of a new token; so nothing that it copies is of this step, and it never
  waits for the kernel before. The other makes the new tokens' keys and values, and puts them into their
  row of the ring and into their page. Both arrive at each stage's `full`.
- older chips: each consumer warp copies its own rows of 16 tokens, and the one that has the new token
  makes its key and value.
*/
#pragma once

#include "common.cuh"       // defines: mbarrier_*, bulk_copy, cp_async, kv_block_offset, pdl_wait
#include "decode_new.cuh"   // defines: NewTokens, NewKeyValue, row_scale
#include "decode_plan.cuh"  // defines: TILE, Walk
#include "decode_tile.cuh"  // defines: sizes, Shared

struct Pages {
    uint8_t* kv;
    const int* page_table;
    int num_kv_heads, table_stride, page_shift;

    __device__ int page_size() const { return 1 << page_shift; }
    __device__ int rows() const { return min(page_size(), TILE); }
    __device__ const int* row_of(int slot) const {
        return page_table + (int64_t)slot * table_stride;
    }
    __device__ uint8_t* block(int page, int head) const {
        return kv + kv_block_offset(page, head, 0, num_kv_heads, page_size(), HEAD_DIM);
    }
    __device__ void store(const NewKeyValue& fresh, const Walk& walk) const {
        int position = walk.length - 1, page = row_of(walk.slot)[position >> page_shift];
        fresh.store(block(page, walk.head), position & (page_size() - 1), page_size());
    }
};

#if HAS_BULK_COPY
// Every tile of the stretch into the ring, as the consumers empty it.
__device__ void produce(Walk walk, const Pages& pages, uint32_t stages, Shared& shared) {
    int lane = threadIdx.x % 32;
    int rows = pages.rows();
    int pages_per_tile = TILE / rows;
    int sub = lane / PIECES, piece = lane % PIECES;
    bool has_copy = sub < pages_per_tile;
    uint64_t policy = policy_evict_first();
    int stage = 0, parity = 1;  // a fresh barrier counts as having completed the phase before
    int window_seq = -1, window = 0, page_ids = 0;  // the lanes hold 32 pages from column window on
    while (walk.next()) {
        const int* row = pages.row_of(walk.slot);
        int num_pages = (walk.length + pages.page_size() - 1) >> pages.page_shift;
#pragma unroll 1
        for (int tile = walk.tile; tile < walk.last_tile; tile++) {
            int column = (tile * TILE) >> pages.page_shift;
            if (window_seq != walk.seq || column < window ||
                column + pages_per_tile > window + 32) {
                window_seq = walk.seq;
                // The heads of a sequence have the same pages: where 32 are all, they stay.
                window = num_pages <= 32 ? 0 : column;
                page_ids = row[min(window + lane, num_pages - 1)];
            }
            int page = __shfl_sync(~0u, page_ids, (column - window + sub) & 31);
            int tokens = min(TILE, walk.length - 1 - tile * TILE);  // without the new one
            uint32_t barrier = shared_address(&shared.full[stage]);
            mbarrier_wait(shared_address(&shared.empty[stage]), parity);
            if (lane == 0) mbarrier_arrive_expect(barrier, tokens * TOKEN_BYTES);
            __syncwarp();
            int count = min(rows, tokens - sub * rows);
            if (has_copy && count > 0) {
                const uint8_t* from = pages.block(page, walk.head);
                uint32_t to = stages + stage * STAGE_BYTES + sub * rows * TOKEN_BYTES;
                if (count == pages.page_size()) {
                    if (piece == 0) bulk_copy(to, from, count * TOKEN_BYTES, barrier, policy);
                } else {
                    int first_row = (tile * TILE) & (pages.page_size() - 1) & ~(rows - 1);
                    from += (piece * pages.page_size() + first_row) * 128;
                    bulk_copy(to + piece * rows * 128, from, count * 128, barrier, policy);
                }
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}

// What is new in the tiles: the scale of the sequence's row beside each, and the new token's key and
// value in the last of the sequence. It runs ahead of the consumers as the copies do.
__device__ void make_new(
    Walk walk, const Pages& pages, uint32_t stages, Shared& shared, const NewTokens& tokens,
    bool has_waited) {
    int lane = threadIdx.x % 32;
    int rows = pages.rows(), half_bytes = rows * 128;
    int stage = 0, parity = 1;
    int scaled_seq = -1;
    float scale = 1.0f;
    if (!has_waited) pdl_wait();
    while (walk.next()) {
        NewKeyValue fresh;  // asked for beside what its scale is made of
        if (walk.last_tile == walk.tiles)
            fresh.load(tokens, walk.seq, walk.head, walk.length - 1);
        if (tokens.rows && scaled_seq != walk.seq) {
            scaled_seq = walk.seq;
            scale = row_scale(tokens, walk.seq);
        }
#pragma unroll 1
        for (int tile = walk.tile; tile < walk.last_tile; tile++) {
            bool is_last = tile == walk.tiles - 1;
            if (is_last) fresh.make(tokens, scale);
            mbarrier_wait(shared_address(&shared.empty[stage]), parity);
            if (is_last) {
                int row = (walk.length - 1) % TILE;
                uint32_t k = stages + stage * STAGE_BYTES + row / rows * rows * TOKEN_BYTES +
                             row % rows / 16 * 16 * 128;
                fresh.patch(k, k + HALVES * half_bytes, half_bytes, row % 16);
            }
            if (lane == 0) shared.scale[stage] = scale;
            mbarrier_arrive(shared_address(&shared.full[stage]));
            if (is_last) pages.store(fresh, walk);
            __syncwarp();
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}
#else
// A warp's own loads: its 16 rows of each tile of the stretch, STAGES - 1 tiles ahead.
struct WarpLoads {
    Walk walk;
    const Pages& pages;
    uint32_t to;     // the warp's rows in stage 0
    int offset;      // of the warp's 16 rows in a tile
    int stage, page;
    bool more;

    __device__ WarpLoads(const Walk& start, const Pages& pages, uint32_t to, int offset)
        : walk(start), pages(pages), to(to), offset(offset), stage(0), page(0) {
        more = walk.next();
        find_page();
    }

    __device__ void find_page() {
        if (!more) return;
        int token = min(walk.tile * TILE + offset, walk.length - 1);
        page = pages.row_of(walk.slot)[token >> pages.page_shift];
    }

    // Starts the copies of one tile, and closes a group even where there is nothing left to copy.
    __device__ void issue() {
        if (more) {
            int token = walk.tile * TILE + offset;
            if (token < walk.length) {
                int lane = threadIdx.x % 32;
                const uint8_t* from = pages.block(page, walk.head) +
                                      (token & (pages.page_size() - 1)) * 128 + lane * 16;
                uint32_t target = to + stage * STAGE_BYTES + lane * 16;
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
                    for (int part = 0; part < 4; part++)
                        cp_async_16(target + piece * pages.rows() * 128 + part * 512,
                                    from + piece * pages.page_size() * 128 + part * 512);
                }
            }
            if (++walk.tile == walk.last_tile) more = walk.next();
            find_page();
        }
        if (++stage == STAGES) stage = 0;
        cp_async_commit();
    }
};
#endif
