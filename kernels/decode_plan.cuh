/*
The work of attention_decode: one line of tiles, cut into equal stretches.

The tiles of 64 tokens of all (sequence, kv head) pairs follow each other, sequence by sequence and
in it head by head. Block p of the grid takes stretch p; a segment is what it has of one pair.
Everything is in closed form from context_lens, so nothing is planned on the host or stored.
*/
#pragma once

#include "common.cuh"  // defines: ceil_div

constexpr int TILE = 64;

// The line of tiles cut into equal stretches: block p has tiles start(p) .. start(p + 1) - 1.
struct Stretches {
    int quotient, remainder;

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

// The walk over this block's stretch. Every warp plans for itself: a lane sums the tiles of its
// share of the sequences, a scan gives the line's length, a lane finds where the stretch begins.
__device__ Walk plan(
    const int* context_lens, const int* seq_slots, int num_seqs, int num_kv_heads,
    Stretches& stretches) {
    int lane = threadIdx.x % 32;
    int share = ceil_div(num_seqs, 32);
    int begin = lane * share, stop = min(begin + share, num_seqs);
    // Read beside the length, though most lanes need none: one latency less on the way to a page.
    int slot = begin < num_seqs ? seq_slots[begin] : 0;
    int mine = 0;
#pragma unroll 4
    for (int i = begin; i < stop; i++) mine += Walk::tiles_of(context_lens[i]);
    int inclusive = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int below = __shfl_up_sync(~0u, inclusive, offset);
        if (lane >= offset) inclusive += below;
    }
    stretches = Stretches(__shfl_sync(~0u, inclusive, 31) * num_kv_heads, gridDim.x);
    Walk walk;
    walk.context_lens = context_lens;
    walk.seq_slots = seq_slots;
    walk.num_kv_heads = num_kv_heads;
    walk.position = stretches.start(blockIdx.x);
    walk.end = stretches.start(blockIdx.x + 1);
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
