/*
What the parts of gemm_wide share: sizes by its -D constants, its arguments, the piece of work that a
block takes, and the ring that its steps pass through.
*/
#pragma once

#include "common.cuh"  // defines: bf16, ceil_div

constexpr int STEP_K = 64;  // 128 bytes: a swizzled row
constexpr int SUBTILES = GATED ? 2 : 1;
constexpr int FEATURES = 64 * WARPGROUPS;  // of out; as many boxes of W's rows as there are subtiles
constexpr int BOX_BYTES = FEATURES * STEP_K * 2;
constexpr int WEIGHT_BYTES = SUBTILES * BOX_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + COLUMNS * STEP_K * 2;
constexpr int MAX_STAGES = 16;
constexpr int BLOCK = 128 * (WARPGROUPS + 1);
constexpr int MIN_BLOCKS = GATED ? 1 : 2;  // 2: the next kernel's blocks wait beside, W in their rings
constexpr int GROUPS = COLUMNS / 8;        // of tokens: 4 sums of a subtile, a thread
constexpr int SUMS = GROUPS * 4;
constexpr int SHARE = (GROUPS + SPLIT - 1) / SPLIT;  // groups that a block of a cluster finishes
constexpr int MAX_ROWS = 256;
constexpr int SPARE_WARPS = 3, SPARE_THREADS = 32 * SPARE_WARPS;
constexpr int SPARE_BARRIER = 1;  // a named barrier
constexpr int NUM_SCALES = SHARE * SPLIT * 8;  // in shared memory: of whole shares
constexpr int BARRIER_BYTES = 1024;  // of shared memory; scales and the spare warps' sums are in it
constexpr int SCALES_OFFSET = (2 * MAX_STAGES + 2) * 8;
static_assert(SCALES_OFFSET + (NUM_SCALES + SPARE_WARPS) * 4 <= BARRIER_BYTES);

struct Arguments {
    bf16* out;
    const bf16* x;
    float4* partials;
    float* scales;
    int num_rows, n, k, out_stride, stages, add, normed;
    float eps;

    // Of out.
    __device__ __forceinline__ int width() const { return n / SUBTILES; }
    // Blocks that have the scales of all rows.
    __device__ __forceinline__ uint32_t* scales_used() const {
        return (uint32_t*)(scales + MAX_ROWS);
    }
};

// The steps of K that a block takes: a piece of the line of all tiles' steps, cut at tiles.
struct Piece {
    int tile, first, last;  // steps first .. last - 1 of the tile
    int at, end, steps_of_tile;

    __device__ __forceinline__ Piece(const Arguments& a) : steps_of_tile(a.k / STEP_K) {
        at = begin_of(a, blockIdx.x);
        end = begin_of(a, blockIdx.x + 1);
    }
    __device__ __forceinline__ int begin_of(const Arguments& a, int block) const {
        if (SPLIT > 1)
            return block / SPLIT * steps_of_tile + block % SPLIT * steps_of_tile / SPLIT;
        const int64_t steps = (int64_t)ceil_div(a.width(), FEATURES) * steps_of_tile;
        return (int)(steps * block / gridDim.x);
    }
    __device__ __forceinline__ bool next() {
        if (at == end) return false;
        tile = at / steps_of_tile;
        first = at - tile * steps_of_tile;
        last = min(steps_of_tile, first + end - at);
        at += last - first;
        return true;
    }
};

// The ring's barriers, and two more: of sums from the cluster, and of the scales, which lie behind.
// The stages follow.
struct Ring {
    uint32_t full, empty, received, scaled, stages;
    int count, stage = 0, parity = 0;

    __device__ __forceinline__ Ring(uint32_t base, int num_stages)
        : full(base), empty(full + 8 * MAX_STAGES), received(empty + 8 * MAX_STAGES),
          scaled(received + 8), stages(base + BARRIER_BYTES), count(num_stages) {}
    __device__ __forceinline__ void advance() {
        if (++stage == count) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ uint32_t weight() const { return stages + stage * STAGE_BYTES; }
    __device__ __forceinline__ uint32_t x() const { return weight() + WEIGHT_BYTES; }
};
