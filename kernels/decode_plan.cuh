/*
The work of attention_decode, cut for the blocks of the grid: a segment is what a block has of one
(sequence, kv head) pair.

- Stretches: the pairs follow each other on one line, sequence by sequence and in it head by head. A
  pair has a place on it for each of its tiles of 64 tokens, and behind these PAIR_COST more: many short
  sequences are also many pairs to begin and to end. Each block takes a stretch of the line, all as
  long, but those that begin late (beside prefill attention) by `delay` places shorter. That suits
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
// Tiles that a block could read while it ends a pair and begins the next; on an H200.
constexpr int PAIR_COST = CLUSTER == 1 ? 3 * (128 / HEAD_DIM) : 0;
constexpr bool HAS_LATE = CLUSTER == 1;  // clusters do not run beside prefill attention

// What a pair was cut into, and which of these a segment is.
struct Cut {
    int first, split, num_splits;  // the block that has split 0; split i is in block first + i
};

// Places cut into equal stretches: block p has places start(p) .. start(p + 1) - 1.
struct Stretches {
    int quotient, remainder;

    Stretches() = default;
    __device__ Stretches(int total, int num_blocks)
        : quotient(total / num_blocks), remainder(total % num_blocks) {}
    __device__ int start(int block) const { return block * quotient + min(block, remainder); }
    __device__ int owner(int place) const {
        int longer = remainder * (quotient + 1);
        return place < longer ? place / (quotient + 1)
                              : remainder + (place - longer) / quotient;
    }
};

// The whole line, cut for the blocks that begin at once, and behind these for the late ones.
struct Line {
    Stretches early;
    int num_early, early_places, late;  // places of a late block

    Line() = default;
    __device__ Line(int total, int num_blocks, int num_early, int delay) : num_early(num_early) {
        int num_late = HAS_LATE ? num_blocks - num_early : 0;
        late = max(0, (total + num_late * delay) / num_blocks - delay);
        early_places = total - num_late * late;
        early = Stretches(early_places, num_early);
    }
    __device__ int start(int block) const {
        if (!HAS_LATE || block <= num_early) return early.start(block);
        return early_places + (block - num_early) * late;
    }
    __device__ int owner(int place) const {
        if (!HAS_LATE || place < early_places) return early.owner(place);
        return num_early + (place - early_places) / late;
    }
};

// Walks a block's stretch of the line, segment by segment.
struct Walk {
    const int* context_lens;
    const int* seq_slots;
    int num_kv_heads, pair_cost;
    int next_place, end;           // on the line: the pair to come begins, the stretch ends
    int next_head, skipped;        // its head; tiles of it that an earlier block has
    int seq, slot, length, tiles;  // current sequence, its row of the page table
    int line_start, head;          // current pair: its first place
    int tile, last_tile;           // current segment: tiles tile .. last_tile - 1

    __device__ static int tiles_of(int length) { return (length + TILE - 1) / TILE; }
    __device__ static int places_of(int tiles, int pair_cost) {
        return tiles == 0 ? 0 : tiles + pair_cost;
    }

    __device__ void enter(int new_seq, int new_slot) {
        seq = new_seq;
        slot = new_slot;
        length = context_lens[seq];
        tiles = tiles_of(length);
    }

    // To a place among those of the current sequence, whose first is `begin`.
    __device__ void go_to(int place, int begin) {
        int places = max(1, places_of(tiles, pair_cost));
        next_head = (place - begin) / places;
        next_place = begin + next_head * places;
        skipped = place - next_place;
        if (skipped >= tiles) next_head++, next_place += places, skipped = 0;
    }

    __device__ bool next() {
        if (next_place + skipped >= end) return false;
        if (next_head == num_kv_heads) {
            next_head = 0;
            do enter(seq + 1, seq_slots[seq + 1]);
            while (tiles == 0);
        }
        line_start = next_place;
        head = next_head++;
        tile = skipped;
        last_tile = min(tiles, end - line_start);
        next_place += tiles + pair_cost;
        skipped = 0;
        return true;
    }
};

// How the line is cut, or this block's pair.
struct Cuts {
    Line line;
    int line_start, first_block;  // where the first of them is, and who has it
    bool even;

    __device__ Cut of(const Walk& walk) const {
        if (walk.tile == 0 && walk.last_tile == walk.tiles) return {(int)blockIdx.x, 0, 1};
        int start = walk.line_start - line_start;
        int first = first_block + line.owner(start);
        int last = first_block + line.owner(start + walk.tiles - 1);
        return {first, (int)blockIdx.x - first, last - first + 1};
    }
};

// The walk over what this block has. Every warp plans for itself: a lane sums the places of its share
// of the sequences, a scan gives the line's length, a lane finds where the block begins.
__device__ Walk plan(
    const int* context_lens, const int* seq_slots, int num_seqs, int num_kv_heads, bool may_be_even,
    int num_early, int delay, Cuts& cuts) {
    int lane = threadIdx.x % 32, block = blockIdx.x;
    int share = ceil_div(num_seqs, 32);
    int begin = lane * share, stop = min(begin + share, num_seqs);
    // Read beside the length, though most lanes need none: one latency less on the way to a page.
    int slot = begin < num_seqs ? seq_slots[begin] : 0;
    int mine = 0, most = 0;
#pragma unroll 4
    for (int i = begin; i < stop; i++) {
        int tiles = Walk::tiles_of(context_lens[i]);
        mine += Walk::places_of(tiles, PAIR_COST);
        most = max(most, tiles);
    }
    int inclusive = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int below = __shfl_up_sync(~0u, inclusive, offset);
        if (lane >= offset) inclusive += below;
    }
    Line line(__shfl_sync(~0u, inclusive, 31) * num_kv_heads, gridDim.x, num_early, delay);
    Walk walk;
    walk.context_lens = context_lens;
    walk.seq_slots = seq_slots;
    walk.num_kv_heads = num_kv_heads;
    most = ceil_div(__reduce_max_sync(~0u, most), CLUSTER);
    if (may_be_even && most <= max(SHORT, line.early.quotient + 1)) {
        int pair = block / CLUSTER, rank = block % CLUSTER;
        int seq = min(pair / num_kv_heads, num_seqs - 1);
        int head = pair - seq * num_kv_heads;
        walk.pair_cost = 0;
        walk.enter(seq, seq_slots[seq]);
        cuts = {Line(walk.tiles, CLUSTER, CLUSTER, 0), head * walk.tiles, block - rank, true};
        walk.go_to(cuts.line_start + cuts.line.start(rank), 0);
        walk.end = cuts.line_start + cuts.line.start(rank + 1);
        if (head >= num_kv_heads) walk.end = 0;  // a block without a pair
        return walk;
    }
    cuts = {line, 0, 0, false};
    int place = line.start(block);
    int before = inclusive - mine, seq = begin;
    bool found = place < inclusive * num_kv_heads;
    unsigned int lanes = __ballot_sync(~0u, found);
    int finder = lanes ? __ffs(lanes) - 1 : 0;
    if (lane == finder && found) {
        for (;; seq++) {
            int places = Walk::places_of(Walk::tiles_of(context_lens[seq]), PAIR_COST);
            if (place < (before + places) * num_kv_heads) break;
            before += places;
        }
        if (seq != begin) slot = seq_slots[seq];
    }
    walk.pair_cost = PAIR_COST;
    walk.enter(__shfl_sync(~0u, seq, finder), __shfl_sync(~0u, slot, finder));
    walk.go_to(place, __shfl_sync(~0u, before, finder) * num_kv_heads);
    walk.end = line.start(block + 1);
    return walk;
}
