/* Work list of prefill attention: which rows of which sequence and head are tile number i.

   Rows are packed: the `group` query heads that share one kv head stand beside each other, so row r
   of a sequence is its token r / group and query head kv_head * group + r % group. A tile is ROWS
   such rows of one (sequence, kv head). Packing costs nothing for long prompts (the heads of a
   token are adjacent in memory) and fills the tile for short ones.

   Order: sequence by sequence; within one, blocks of kv heads whose keys and values fit the L2
   cache together; within a block, the rows that see most keys first (so that the last tiles to be
   taken are short ones), kv heads innermost. Nothing is stored: a warp finds tile i by a scan over
   the sequence lengths, 32 sequences at a time, and only ever moves forward. */
#pragma once

struct PrefillTile {
    int sequence;  // index in the step, or -1 past the last tile
    int kv_head;
    int row;      // first packed row
    int q_begin;  // token offset of the sequence in q and out
    int q_len;    // tokens in this step
    int context;  // kv length, this step's tokens included
};

// Exact for 0 <= n < 2^27 and 1 <= group <= 16; `inverse` is ceil(2^32 / group) mod 2^32.
__device__ __forceinline__ int divide_by_group(int n, int group, unsigned inverse) {
    return group == 1 ? n : (int)__umulhi((unsigned)n, inverse);
}

__device__ __forceinline__ unsigned group_inverse(int group) {
    return 0xffffffffu / (unsigned)group + 1u;
}

// Walks the work list; every lane of one warp holds it and calls it together.
template <int ROWS, int TOKEN_BYTES>  // TOKEN_BYTES: key and value of one token and kv head
struct PrefillTiles {
    static constexpr int L2_BYTES = 20 << 20;  // keys and values meant to stay in L2

    const int* q_start;
    const int* context_lens;
    int next;  // first sequence after the window
    int end;   // first sequence after the last
    int group;
    int num_kv_heads;
    int before;                   // tiles before the window
    int inclusive;                // tiles of the window up to and including this lane's sequence
    int q_begin, q_len, context;  // this lane's sequence

    __device__ void load_window() {
        const int lane = threadIdx.x & 31;
        const int sequence = next + lane;
        q_begin = q_len = context = 0;
        if (sequence < end) {
            q_begin = q_start[sequence];
            q_len = q_start[sequence + 1] - q_begin;
            context = context_lens[sequence];
        }
        inclusive = (q_len * group + ROWS - 1) / ROWS * num_kv_heads;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
            if (lane >= step) inclusive += other;
        }
        next += 32;
    }

    __device__ PrefillTiles(const int* q_start, const int* context_lens, int first, int count,
        int group, int num_kv_heads)
        : q_start(q_start),
          context_lens(context_lens),
          next(first),
          end(first + count),
          group(group),
          num_kv_heads(num_kv_heads),
          before(0) {
        load_window();
    }

    // Tile numbers must not decrease from call to call.
    __device__ PrefillTile find(int index) {
        PrefillTile tile;
        tile.sequence = -1;
        int window_tiles = __shfl_sync(0xffffffffu, inclusive, 31);
        while (index >= before + window_tiles) {
            if (next >= end) return tile;
            before += window_tiles;
            load_window();
            window_tiles = __shfl_sync(0xffffffffu, inclusive, 31);
        }
        index -= before;
        const int source = __popc(__ballot_sync(0xffffffffu, inclusive <= index));
        const int previous = __shfl_sync(0xffffffffu, inclusive, (source + 31) & 31);
        if (source > 0) index -= previous;
        tile.sequence = next - 32 + source;
        tile.q_begin = __shfl_sync(0xffffffffu, q_begin, source);
        tile.q_len = __shfl_sync(0xffffffffu, q_len, source);
        tile.context = __shfl_sync(0xffffffffu, context, source);

        const int row_tiles = (tile.q_len * group + ROWS - 1) / ROWS;
        const int fitting = L2_BYTES / TOKEN_BYTES / tile.context;
        const int heads = max(1, min(num_kv_heads, fitting));
        const int block = index / (row_tiles * heads);
        index -= block * row_tiles * heads;
        const int width = min(heads, num_kv_heads - block * heads);
        const int row_tile = index / width;
        tile.kv_head = block * heads + index - row_tile * width;
        tile.row = (row_tiles - 1 - row_tile) * ROWS;
        return tile;
    }
};
