/*
The work of attention_decode, cut for the blocks of the grid: a segment is what a block has of one
(sequence, kv head) pair.

- Stretches: the tiles of 64 tokens of all pairs follow each other on one line, sequence by sequence
  and in it head by head. Block p takes stretch p of as many equal ones as there are blocks. That suits
  any lengths, but parts of a pair are merged by way of memory, which takes longer than a few tiles.
- Even: where pairs are few and no block gets many more tiles so, each pair is cut by itself, for the
  blocks of a cluster (CLUSTER 1: not at all). These have a shorter way to merge.
Everything is in closed form from context_lens, so nothing is planned on the host or stored.
*/
#pragma once

#include "common.cuh"  // defines: ceil_div

constexpr int TILE = 64;
// Tiles of a block that take no longer than parts that are merged by way of memory. The larger the
// clusters, the fewer the blocks, and the more of the bandwidth one gets.
constexpr int SHORT = (CLUSTER == 1 ? 2 : CLUSTER == 2 ? 8 : 16) * (128 / HEAD_DIM);

// What a pair was cut into, and which of these a segment is.
struct Cut {
    int first, split, num_splits;  // the block that has split 0; split i is in block first + i
};

// The line of tiles cut into equal stretches: block p has tiles start(p) .. start(p + 1) - 1.
struct Stretches {
    int quotient, remainder;

    Stretches() = default;
    __device__ Stretches(int total, int num_blocks)
        : quotient(total / num_blocks), remainder(total % num_blocks) {}
    __device__ int start(int block) const { return block * quotient + min(block, remainder); }
    __device__ int owner(int tile) const {
        int longer = remainder * (quotient + 1);
        return tile < longer ? tile / (quotient + 1) : remainder + (tile - longer) / quotient;
    }
};

// Walks a block's stretch of the line, segment by segment.
struct Walk {
    const int* context_lens;
    const int* seq_slots;
    int position, end;             // on the line
    int num_kv_heads;
    int seq, length, tiles, before;  // current sequence; tiles of all earlier sequences (one head)
    int slot;                        // its row of the page table
    int head, tile, last_tile;     // current segment: tiles tile .. last_tile - 1 of (seq, head)

    __device__ static int tiles_of(int length) { return (length + TILE - 1) / TILE; }

    __device__ void enter(int new_seq, int new_slot) {
        seq = new_seq;
        slot = new_slot;
        length = context_lens[seq];
        tiles = tiles_of(length);
    }

    __device__ bool next() {
        if (position >= end) return false;
        while (position >= (before + tiles) * num_kv_heads) {
            before += tiles;
            enter(seq + 1, seq_slots[seq + 1]);
        }
        int offset = position - before * num_kv_heads;
        head = offset / tiles;
        tile = offset - head * tiles;
        last_tile = min(tiles, tile + end - position);
        position += last_tile - tile;
        return true;
    }

    __device__ int line_start() const { return before * num_kv_heads + head * tiles; }
};

// How the line is cut, or this block's pair.
struct Cuts {
    Stretches stretches;
    int line_start, first_block;  // where the first of them is, and who has it
    bool even;

    __device__ Cut of(const Walk& walk) const {
        int start = walk.line_start() - line_start;
        int first = first_block + stretches.owner(start);
        int last = first_block + stretches.owner(start + walk.tiles - 1);
        return {first, (int)blockIdx.x - first, last - first + 1};
    }
};

// The walk over what this block has. Every warp plans for itself: a lane sums the tiles of its share
// of the sequences, a scan gives the line's length, a lane finds where the block begins.
__device__ Walk plan(
    const int* context_lens, const int* seq_slots, int num_seqs, int num_kv_heads, bool may_be_even,
    Cuts& cuts) {
    int lane = threadIdx.x % 32, block = blockIdx.x;
    int share = ceil_div(num_seqs, 32);
    int begin = lane * share, stop = min(begin + share, num_seqs);
    // Read beside the length, though most lanes need none: one latency less on the way to a page.
    int slot = begin < num_seqs ? seq_slots[begin] : 0;
    int mine = 0, most = 0;
#pragma unroll 4
    for (int i = begin; i < stop; i++) {
        int tiles = Walk::tiles_of(context_lens[i]);
        mine += tiles;
        most = max(most, tiles);
    }
    int inclusive = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int below = __shfl_up_sync(~0u, inclusive, offset);
        if (lane >= offset) inclusive += below;
    }
    Stretches stretches(__shfl_sync(~0u, inclusive, 31) * num_kv_heads, gridDim.x);
    Walk walk;
    walk.context_lens = context_lens;
    walk.seq_slots = seq_slots;
    walk.num_kv_heads = num_kv_heads;
    most = ceil_div(__reduce_max_sync(~0u, most), CLUSTER);
    if (may_be_even && most <= max(SHORT, stretches.quotient + 1)) {
        int pair = block / CLUSTER, rank = block % CLUSTER;
        int seq = min(pair / num_kv_heads, num_seqs - 1);
        int head = pair - seq * num_kv_heads;
        walk.before = 0;
        walk.enter(seq, seq_slots[seq]);
        cuts = {Stretches(walk.tiles, CLUSTER), head * walk.tiles, block - rank, true};
        walk.position = cuts.line_start + cuts.stretches.start(rank);
        walk.end = cuts.line_start + cuts.stretches.start(rank + 1);
        if (head >= num_kv_heads) walk.end = walk.position;  // a block without a pair
        return walk;
    }
    cuts = {stretches, 0, 0, false};
    walk.position = stretches.start(block);
    walk.end = stretches.start(block + 1);
    int before = inclusive - mine, seq = begin;
    bool found = walk.position < inclusive * num_kv_heads;
    unsigned int lanes = __ballot_sync(~0u, found);
    int finder = lanes ? __ffs(lanes) - 1 : 0;
    if (lane == finder && found) {
        for (;; seq++) {
            int tiles = Walk::tiles_of(context_lens[seq]);
            if (walk.position < (before + tiles) * num_kv_heads) break;
            before += tiles;
        }
        if (seq != begin) slot = seq_slots[seq];
    }
    walk.before = __shfl_sync(~0u, before, finder);
    seq = __shfl_sync(~0u, seq, finder);
    slot = __shfl_sync(~0u, slot, finder);
    walk.enter(seq, slot);
    return walk;
}
