/*
Top-k and top-p: the value at which a row is cut, without a sort.

One pass counts the row in bins of the top 16 bits of its values. A bf16 logit falls in a bin of one
value, so the counts alone give both thresholds: the mass of a bin is its count times one
exponential. Floats (adjusted rows) are counted once more by mass, and finer bins narrow a threshold
down to one value. Counts and masses are integers (mass: fixed-point with MASS_BITS), so that sums do
not depend on their order: equal bits on every run and for every cluster size.

The bins are in descending order of value: 32 octaves of 128 positive bf16 values from 2^-14 on, one
bin for everything smaller in magnitude, 32 octaves down. In a bin of several bf16 values (that one
and the two at the ends) all weigh alike, a part in 2^14 / T off.

Needs SHARED_BYTES of dynamic shared memory.
*/
#pragma once
#include "sample_shared.cuh"  // defines: shared, Row, for_each, Found, cluster_sum, cluster_highest

#define NUM_BINS 8192                 // the last one stays empty
#define SIDE_BINS (NUM_BINS / 2 - 1)  // positive, or negative, bins of one bf16 value
#define SMALLEST ((127 - 14) << 7)    // top bits of 2^-14
#define BINS_PER_WARP (NUM_BINS / (WARPS * CLUSTER))
#define FINE_BITS 13                  // 2^13 bins on the finer levels
#define SHARED_BYTES (NUM_BINS * 12)  // a count and a mass each

#define LOWEST_ORDER 0xff7fffffu  // order of the most negative finite float
#define MASS_BITS 44              // 2^18 values of weight 1 fit in 62 bits
#define BELOW_ONE 0.99999994f     // so that 2^18 times the upper 14 bits stays below 2^32
#define MAX_WEIGHT_GAP 32.0f      // e^-32 of the largest weight: nothing, however many there are

// The bin of a value by its top 16 bits.
__device__ __forceinline__ int bin_of(uint32_t high) {
    const int step = min(max((int)(high & 0x7fff) - (SMALLEST - 1), 0), SIDE_BINS);
    return high & 0x8000 ? SIDE_BINS + step : SIDE_BINS - step;
}

// First order of a bin: its largest value.
__device__ __forceinline__ uint32_t bin_first(int bin) {
    if (bin == 0) return 0;
    if (bin <= SIDE_BINS) return (0x7fffu - (SMALLEST - 1 + SIDE_BINS - bin)) << 16;
    return (0x8000u + (SMALLEST - 1 + bin - SIDE_BINS)) << 16;
}

// The weight of a value relative to the row's largest, computed as the CPU does.
__device__ __forceinline__ float weight_of(float value) {
    return fminf(expf(value / shared.temperature - shared.largest), 1.0f);
}

__device__ __forceinline__ uint64_t fixed_point(float weight) {
    return __float2ull_rn(weight * (float)(1ull << MASS_BITS));
}

// What the bins are: the whole table, or orders from `first` on in steps of 2^shift.
struct Level {
    uint32_t first, last;
    int shift;  // -1: the whole table

    __device__ __forceinline__ uint32_t first_of(int bin) const {
        return shift < 0 ? bin_first(bin) : first + ((uint32_t)bin << shift);
    }
    __device__ __forceinline__ uint32_t last_of(int bin) const {
        if (shift < 0) return bin + 2 < NUM_BINS ? bin_first(bin + 1) - 1 : LOWEST_ORDER;
        return min(last, first_of(bin) + (1u << shift) - 1);
    }
};

#define WHOLE_TABLE Level{0, LOWEST_ORDER, -1}

// The bins: NUM_BINS masses, then as many counts. Each warp of the cluster owns BINS_PER_WARP bins
// (lanes take neighbours, which lie in different banks) and gathers the cluster's there. Masses of
// floats are fixed-point sums of 14 + 14 bits in two words, relative to the bin's largest value;
// then, and for bf16 at once, the whole mass as one integer.
extern __shared__ uint64_t mass_of_bin[];
#define count_of_bin ((uint32_t*)(mass_of_bin + NUM_BINS))

__device__ __forceinline__ int own_bins() {
    return (cluster_rank() * WARPS + (threadIdx.x >> 5)) * BINS_PER_WARP;
}

__device__ __forceinline__ float bin_top(const Level& level, int bin) {
    return fminf(value_of(level.first_of(bin)), shared.maximum);
}

// Puts the row's values with orders first..limit of the level into its bins, by mass too if asked,
// and gathers each warp's own bins. Returns the row's largest value (NaN if there is a NaN). Peers
// may gather from this block's bins until the cluster meets again (`find`): not to be filled before.
template <bool WHOLE, typename T>
__device__ __noinline__ float fill(Row<T> row, Level level, uint32_t limit, bool by_mass) {
    const bool has_mass = by_mass && !Row<T>::IS_BF16;
    for (int bin = threadIdx.x; bin < NUM_BINS; bin += THREADS) {
        count_of_bin[bin] = 0;
        if (has_mass) mass_of_bin[bin] = 0;
    }
    __syncthreads();
    float highest = -INFINITY_F;
    float lowest = value_of(WHOLE ? limit : level.last);
    if (has_mass) lowest = fmaxf(lowest, shared.maximum - MAX_WEIGHT_GAP * shared.temperature);
    for_each(row, [&](int, const Group<T>& group) {
        const float group_highest = group.highest();
        highest = max_or_nan(highest, group_highest);
        if (!(group_highest >= lowest)) return;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float value = group.value(i);
            if (!(value >= lowest)) continue;
            int bin;
            if (WHOLE) {
                bin = bin_of(group.high(i));
            } else {
                const uint32_t order = order_of(value);
                if (order < level.first || order > level.last) continue;
                bin = (order - level.first) >> level.shift;
            }
            atomicAdd(count_of_bin + bin, 1);
            if (has_mass) {
                const float top = bin_top(level, bin) / shared.temperature;
                const float weight = expf(value / shared.temperature - top);
                const uint32_t mass = __float2uint_rn(fminf(weight, BELOW_ONE) * (float)(1 << 28));
                uint32_t* words = (uint32_t*)(mass_of_bin + bin);
                atomicAdd(words, mass & 0x3fff);
                atomicAdd(words + 1, mass >> 14);
            }
        }
    });
    if (WHOLE && !by_mass) highest = cluster_highest(highest);
    else cluster_sync();
    if (CLUSTER > 1) {
        for (int i = threadIdx.x & 31; i < BINS_PER_WARP; i += 32) {
            const int bin = own_bins() + i;
            uint32_t count = 0;
            uint64_t mass = 0;  // two sums in one: neither overflows its word
            for (int rank = 0; rank < CLUSTER; rank++) {
                count += *peer(count_of_bin + bin, rank);
                if (has_mass) mass += *peer(mass_of_bin + bin, rank);
            }
            count_of_bin[bin] = count;
            if (has_mass) mass_of_bin[bin] = mass;
        }
    }
    return highest;
}

template <typename T>
__device__ __forceinline__ uint64_t mass_of(const Level& level, int bin) {
    const uint32_t count = count_of_bin[bin];
    if (count == 0) return 0;
    if (Row<T>::IS_BF16)
        return count * fixed_point(weight_of(Row<T>::value_at(level.last_of(bin))));
    const uint64_t words = mass_of_bin[bin];
    const double inside = (double)((words >> 32 << 14) + (words & 0xffffffffu));
    const double top = (double)weight_of(bin_top(level, bin));
    return __double2ull_rn(inside * top * (double)(1ull << (MASS_BITS - 28)));
}

// The bin where the running amount (count or mass, over bins up to `limit`) reaches the target.
// A target of 0 is set first: top_p of the total mass, or a count of at most top_k. Masses of a
// finer level may be rounded to less than the bin's above: then it is the last bin, or all of them.
template <typename T>
__device__ __forceinline__ Found find(
    const Level& level, uint32_t limit, bool by_mass, uint64_t above, uint64_t& target, int top_k) {
    const int lane = threadIdx.x & 31, begin = own_bins();
    uint64_t mine = 0, before;
    __syncthreads();
    if (threadIdx.x == 0) shared.found = {level.first, level.last, 1, above};
    for (int bin = begin + lane; bin < begin + BINS_PER_WARP; bin += 32) {
        if (level.first_of(bin) > limit) {
            count_of_bin[bin] = 0;
            if (by_mass) mass_of_bin[bin] = 0;
            continue;
        }
        if (by_mass) mass_of_bin[bin] = mass_of<T>(level, bin);
        mine += by_mass ? mass_of_bin[bin] : count_of_bin[bin];
    }
    mine = warp_sum_of(mine);
    const uint64_t total = cluster_sum(mine, before);
    if (target == 0)
        target = by_mass ? min(__double2ull_ru((double)total * (double)shared.top_p), total)
                         : min((uint64_t)top_k, total);
    target = min(target, above + total);
    before += above;
    if (before < target && target <= before + mine) {  // one warp: its bins 32 by 32
        for (int bin = begin + lane;; bin += 32) {
            const uint64_t amount = by_mass ? mass_of_bin[bin] : count_of_bin[bin];
            uint64_t scan = amount;
#pragma unroll
            for (int offset = 1; offset < 32; offset <<= 1) {
                const uint64_t lower = __shfl_up_sync(~0u, scan, offset);
                if (lane >= offset) scan += lower;
            }
            scan += before;
            if (scan - amount < target && target <= scan) {
                const Found found = {
                    level.first_of(bin), level.last_of(bin), count_of_bin[bin], scan - amount};
                for (int rank = 0; rank < CLUSTER; rank++) *peer(&shared.found, rank) = found;
            }
            before = __shfl_sync(~0u, scan, 31);
            if (target <= before) break;
        }
    }
    cluster_sync();
    return shared.found;
}

// The limit of the smallest set of largest values, ties included, that has top_k values, or (0) top_p
// of the mass of the values up to `limit`. The whole table is filled; num_levels: how many were used.
struct Cut {
    uint32_t limit;
    int num_levels;
};

template <typename T>
__device__ __noinline__ Cut cut(Row<T> row, uint32_t limit, int top_k) {
    const bool by_mass = top_k == 0;
    Level level = WHOLE_TABLE;
    uint64_t above = 0, target = 0;
    for (int num_levels = 1;; num_levels++) {
        const Found found = find<T>(level, limit, by_mass, above, target, top_k);
        const bool one_value = found.last - found.first < (Row<T>::IS_BF16 ? 1u << 16 : 1u);
        if (one_value || found.num_inside == 1 ||
            (!by_mass && found.above + found.num_inside == target))
            return {min(limit, found.last), num_levels};
        above = found.above;
        const uint32_t last = min(found.last, limit);
        level = {found.first, last, max(0, 32 - __clz(last - found.first) - FINE_BITS)};
        fill<false>(row, level, limit, by_mass);
    }
}
