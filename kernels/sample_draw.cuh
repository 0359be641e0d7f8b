/*
One token of what is kept: the argmax, or that of value + Gumbel noise. An id whose noise would have
to be improbably large is skipped before its noise is computed.
*/
#pragma once
#include "sample_shared.cuh"  // defines: shared, Row, for_each, Best, take

#define LEAST_CHANCE 5.9e-8f  // a little under 2^-24, the least 1 - u

// The words of 8 ids from a multiple of 8: two counters under the same round keys.
__device__ __forceinline__ void philox(int id, uint32_t (&words)[8]) {
    uint32_t k0 = shared.seed_lo, k1 = shared.seed_hi;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        words[4 * i] = (id >> 2) + i, words[4 * i + 1] = shared.position;
        words[4 * i + 2] = words[4 * i + 3] = 0;
    }
#pragma unroll
    for (int round = 0; round < 10; round++) {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const uint64_t first = (uint64_t)words[i] * 0xD2511F53u;
            const uint64_t second = (uint64_t)words[i + 2] * 0xCD9E8D57u;
            words[i] = (uint32_t)(second >> 32) ^ words[i + 1] ^ k0;
            words[i + 2] = (uint32_t)(first >> 32) ^ words[i + 3] ^ k1;
            words[i + 1] = (uint32_t)second, words[i + 3] = (uint32_t)first;
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
}

__device__ __forceinline__ float gumbel(uint32_t word) {
    const float u = ((float)(word >> 9) + 0.5f) * 1.1920928955078125e-07f;
    return -logf(-logf(u));
}

// The largest value of all warps' bests so far, or one a little older: any is good for skipping.
__device__ __forceinline__ float raise_floor(float value) {
    const uint32_t mine = __reduce_max_sync(~0u, ~order_of(value));
    uint32_t floor = 0;
    if ((threadIdx.x & 31) == 0) floor = max(mine, atomicMax(&shared.floor, mine));
    return value_of(~__shfl_sync(~0u, floor, 0));
}

// What a thread, then a block, then the cluster knows of the draw: the best, and the row's largest
// value (NaN if there is a NaN).
struct Result {
    Best best;
    float highest;

    __device__ __forceinline__ void join(const Best& other, float other_highest) {
        take(best, other.value, other.id);
        highest = max_or_nan(highest, other_highest);
    }
};

#define NO_RESULT {{-INFINITY_F, 0x7fffffff}, -INFINITY_F}

// Argmax of the row itself.
template <typename T>
__device__ __noinline__ Result greedy(Row<T> row) {
    Result result = NO_RESULT;
    for_each(row, [&](int id, const Group<T>& group) {
        const float highest = group.highest();
        result.highest = max_or_nan(result.highest, highest);
        if (!(highest > result.best.value)) return;
        result.best.value = highest;
#pragma unroll
        for (int i = 7; i >= 0; i--)
            if (group.value(i) == highest) result.best.id = id + i;
    });
    return result;
}

// Argmax of l / T + noise over ids with l / T >= threshold.
//
// -log(-log(u)) < -log(1 - u), so an id can only pass the best by a distance d if 1 - u < e^-d: one
// exponential a group tells which words may do that. The products with 1 / T that decide what to
// skip are not the quotients that decide the draw; the slack is more than they may differ.
template <typename T>
__device__ __noinline__ Result draw_from(Row<T> row, float threshold) {
    Result result = NO_RESULT;
    const float inverse = 1.0f / shared.temperature;
    const float lowest =
        threshold > -INFINITY_F ? threshold - 1e-3f - 1e-6f * fabsf(threshold) : -INFINITY_F;
    float floor = -INFINITY_F;
    if (threadIdx.x == 0) shared.floor = 0;
    __syncthreads();
    const auto chance_of = [&](float score) {
        return exp2_fast((score - floor + 1e-3f + 1e-6f * fabsf(floor)) * LOG2E);
    };
    for_each(row, [&](int id, const Group<T>& group) {
        const float highest = group.highest();
        result.highest = max_or_nan(result.highest, highest);
        const float score = highest * inverse;
        const bool kept = highest > -INFINITY_F && !(score < lowest);
        if (!__any_sync(~0u, kept && !(chance_of(score) < LEAST_CHANCE))) return;
        floor = raise_floor(result.best.value);
        const float chance = chance_of(score);
        if (!kept || chance < LEAST_CHANCE) return;
        uint32_t words[8];
        philox(id, words);
        // ~word / 2^32 is 1 - u within 2^-23.
        const uint32_t reach =
            chance < 0.99f ? __float2uint_ru(chance * 4294967296.0f) + 1024 : ~0u;
        uint32_t able = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) able |= (uint32_t)(~words[i] <= reach) << i;
#pragma unroll 1
        for (; able; able &= able - 1) {
            const int i = __ffs(able) - 1;
            uint32_t word = words[0];
#pragma unroll
            for (int j = 1; j < 8; j++) word = i == j ? words[j] : word;
            const float exact = row.at(id + i) / shared.temperature;
            if (id + i < row.size && exact >= threshold && exact > -INFINITY_F)
                take(result.best, exact + gumbel(word), id + i);
        }
    });
    return result;
}
