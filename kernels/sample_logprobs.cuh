/*
Log-probabilities of a row that asks: log-sum-exp and the largest NUM_TOP logits, for two more passes.
*/
#pragma once
#include "sample_cut.cuh"  // defines: fill, cut, fixed_point, MASS_BITS, and the shared state

// The NUM_TOP best of a list, best first, into `out`, which is filled with nothing before.
template <typename F>
__device__ __forceinline__ void rank_list(const Candidate* list, int size, F&& out) {
    for (int i = threadIdx.x; i < size; i += THREADS) {
        const Candidate mine = list[i];
        int rank = 0;
        for (int j = 0; j < size && rank < NUM_TOP; j++) rank += list[j].beats(mine);
        if (mine.id >= 0 && rank < NUM_TOP) out(rank, mine);
    }
}

// Fills the first block's shared.top for all blocks; returns log(sum of e^(l - maximum)). The row's
// temperature is 1 from here on.
template <typename T>
__device__ __noinline__ float list_top(Row<T> row) {
    fill<true>(row, WHOLE_TABLE, LOWEST_ORDER, false);
    const float at = Row<T>::value_at(cut(row, LOWEST_ORDER, NUM_TOP).limit);
    if (threadIdx.x == 0) shared.num_listed = 0;
    for (int i = threadIdx.x; i < CLUSTER * NUM_TOP; i += THREADS) shared.top[i] = {~0u, -1};
    __syncthreads();
    // The table's memory becomes the list: fewer than NUM_TOP values are above the cut, and of
    // those at it a thread's first NUM_TOP will do, which fits.
    Candidate* list = (Candidate*)mass_of_bin;
    int num_ties = 0;
    uint64_t sum = 0, before;
    for_each(row, [&](int id, const Group<T>& group) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float value = group.value(i);
            sum += fixed_point(expf(value - shared.maximum));
            if (!(value >= at) || (value == at && num_ties++ >= NUM_TOP)) continue;
            list[atomicAdd(&shared.num_listed, 1)] = {order_of(value + 0.0f), id + i};
        }
    });
    sum = cluster_sum(warp_sum_of(sum), before);
    __syncthreads();
    Candidate* top = peer(shared.top, 0) + cluster_rank() * NUM_TOP;
    rank_list(list, shared.num_listed, [&](int rank, const Candidate& one) { top[rank] = one; });
    return logf((float)((double)sum / (double)(1ull << MASS_BITS)));
}

template <typename T>
__device__ __forceinline__ void write_logprobs(Row<T> row, int token) {
    const Logprobs& logprobs = shared.logprobs;
    float log_sum = 0.0f;
    if (token >= 0) log_sum = list_top(row);
    cluster_sync();
    if (cluster_rank() != 0) return;
    if (threadIdx.x < NUM_TOP)
        logprobs.ids[threadIdx.x] = -1, logprobs.values[threadIdx.x] = -INFINITY_F;
    __syncthreads();
    if (token >= 0)
        rank_list(shared.top, CLUSTER * NUM_TOP, [&](int rank, const Candidate& one) {
            logprobs.ids[rank] = one.id;
            logprobs.values[rank] = value_of(one.order) - shared.maximum - log_sum;
        });
    if (threadIdx.x == 0)
        *logprobs.chosen = token >= 0 ? row.at(token) - shared.maximum - log_sum : -INFINITY_F;
}
