/*
What a block knows of its row, and how the threads of a cluster agree on a maximum or a sum.
*/
#pragma once
#include "sample_row.cuh"  // defines: THREADS, WARPS, cluster_*, peer, max_or_nan

#define NUM_TOP 20

struct Best {
    float value;
    int id;
};

__device__ __forceinline__ void take(Best& best, float value, int id) {
    if (value > best.value || (value == best.value && id < best.id)) best = {value, id};
}

struct Candidate {
    uint32_t order;
    int id;

    __device__ __forceinline__ bool beats(const Candidate& other) const {
        return order < other.order || (order == other.order && id < other.id);
    }
};

// The bin in which a cut falls: its orders, the amount above it, the number of values inside.
struct Found {
    uint32_t first, last, num_inside;
    uint64_t above;
};

// What changes a row's logits.
struct Adjustment {
    int flags;
    float presence, frequency, repetition;
    uint16_t* counts;
    bool is_aligned;  // whether counts may be read 8 at once
    const uint32_t* mask;
    const int* bias_ids;
    const float* bias_values;
    int num_bias;
};

struct Logprobs {
    int* ids;        // [NUM_TOP], -1 where the row has no more; null: not asked for
    float* values;   // [NUM_TOP], descending; lowest id first on a tie
    float* chosen;
};

// What one block knows: the row's parameters, then what its threads exchange.
struct Shared {
    float temperature, top_p, min_p;
    int top_k;
    uint32_t position, seed_lo, seed_hi;
    Adjustment adjustment;
    Logprobs logprobs;
    int *token, *last_token;  // where the token goes
    float maximum, largest;  // of the row; the same over the temperature of its weights
    float highest[WARPS];
    Best best[WARPS];
    uint64_t sum[WARPS];
    float block_highest;
    uint64_t block_sum;
    Found found;
    uint32_t floor;  // what the best draw so far reaches, ascending
    int num_listed;
    float final_highest[CLUSTER];  // each block's results, in every block
    Best final_best[CLUSTER];
    Candidate top[CLUSTER * NUM_TOP];  // each block's list, in the first
};

__shared__ Shared shared;

// The largest value of the row in all threads, NaN if one is; also a cluster_sync.
__device__ __noinline__ float cluster_highest(float highest) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        highest = max_or_nan(highest, __shfl_xor_sync(~0u, highest, offset));
    if ((threadIdx.x & 31) == 0) shared.highest[threadIdx.x >> 5] = highest;
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) highest = max_or_nan(highest, shared.highest[warp]);
    if (threadIdx.x == 0) shared.block_highest = highest;
    cluster_sync();
    for (int rank = 0; rank < CLUSTER; rank++)
        highest = max_or_nan(highest, *peer(&shared.block_highest, rank));
    return highest;
}

__device__ __forceinline__ uint64_t warp_sum_of(uint64_t x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// Sum of one number a warp over the cluster, in all threads; `before`: of the warps before.
__device__ __forceinline__ uint64_t cluster_sum(uint64_t mine, uint64_t& before) {
    const int warp = threadIdx.x >> 5;
    if ((threadIdx.x & 31) == 0) shared.sum[warp] = mine;
    __syncthreads();
    uint64_t sum = 0;
    before = 0;
    for (int w = 0; w < WARPS; w++) {
        if (w < warp) before += shared.sum[w];
        sum += shared.sum[w];
    }
    if (CLUSTER == 1) return sum;
    if (threadIdx.x == 0) shared.block_sum = sum;
    cluster_sync();
    sum = 0;
    for (int rank = 0; rank < CLUSTER; rank++) {
        if (rank < cluster_rank()) before += *peer(&shared.block_sum, rank);
        sum += *peer(&shared.block_sum, rank);
    }
    return sum;
}
