/*
The sampler: one token per row of logits, in one launch, with no sort and no host.

The rules are those of backend/sampling.py, number for number: penalties, bias, mask; greedy, or
temperature with top-k, top-p and min-p, and the token is the argmax of l / T + Gumbel noise, where
the noise of an id is Philox4x32-10 of (id, position) under the request's seed. So a row's token
depends on nothing but the row.

A cluster of CLUSTER blocks works on one row (1: one block; more when there are few rows):
  adjust   rows with penalties, bias or mask are first rewritten as floats in a workspace
  argmax   greedy: one pass over the row, done
  cut      rows with top-k or top-p: one pass counts the row in bins of the top 16 bits of its values.
           A bf16 logit falls in a bin of one value, so the counts alone give both thresholds: the
           mass of a bin is its count times one exponential. Floats (adjusted rows) are counted once
           more by mass, and finer bins narrow a threshold down to one value.
  draw     one pass, argmax of value + noise over what is kept. An id whose noise would have to be
           improbably large is skipped before its noise is computed.
  logprobs rows that ask: log-sum-exp and the largest NUM_TOP logits, for two more passes
Counts and masses are integers (mass: fixed-point with MASS_BITS), so that sums do not depend on
their order: equal bits on every run and for every cluster size.

The bins are in descending order of value: 32 octaves of 128 positive bf16 values from 2^-14 on, one
bin for everything smaller in magnitude, 32 octaves down. In a bin of several bf16 values (that one
and the two at the ends) all weigh alike, a part in 2^14 / T off. `order` maps a float to an integer
that ascends as the value descends, so "kept" is order <= limit.

masks: bit id % 32 of word id / 32 of row mask_rows[i] says that sample i may be that id.

Launch: grid (num_rows * CLUSTER), block 512, SHARED_BYTES of dynamic shared memory. LOGIT_FLOAT = 0:
bf16 logits, 1: float. stride (values per row) a multiple of 8, vocab_limit <= stride and at most
2^18. CLUSTER > 1 needs sm_90. Programmatic dependent launch is allowed.
*/
#include "common.cuh"  // defines: bf16, ceil_div, exp2_fast, pdl_wait, pdl_launch_dependents

#define THREADS 512
#define WARPS (THREADS / 32)
#define NUM_BINS 8192                    // the last one stays empty
#define SIDE_BINS (NUM_BINS / 2 - 1)     // positive, or negative, bins of one bf16 value
#define SMALLEST ((127 - 14) << 7)       // top bits of 2^-14
#define BLOCKS_PER_SM (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 ? 2 : 1)  // by SHARED_BYTES
#define BINS_PER_WARP (NUM_BINS / (WARPS * CLUSTER))
#define FINE_BITS 13                     // 2^13 bins on the finer levels
#define SHARED_BYTES (NUM_BINS * 12)     // a count and a mass each

#define HAS_PENALTIES 1
#define HAS_BIAS 2
#define HAS_MASK 4
#define HAS_LOGPROBS 8
#define COUNT_MASK 0x3fff

#define LOWEST_ORDER 0xff7fffffu  // order of the most negative finite float
#define MASS_BITS 44              // 2^18 values of weight 1 fit in 62 bits
#define BELOW_ONE 0.99999994f     // so that 2^18 times the upper 14 bits stays below 2^32
#define MAX_WEIGHT_GAP 32.0f      // e^-32 of the largest weight: nothing, however many there are
#define MAX_NOISE_GAP 21.0f       // an id this far below the largest cannot win
#define LEAST_CHANCE 5.9e-8f      // a little under 2^-24, the least 1 - u
#define MIN_TEMPERATURE 1e-5f     // below: greedy
#define NUM_TOP 20

#if LOGIT_FLOAT
typedef float logit;
#else
typedef bf16 logit;
#endif

// ---------------------------------------------------------------------------------------------
// The cluster: its blocks see each other's shared memory

#if CLUSTER > 1
#define CLUSTER_DIMS __cluster_dims__(CLUSTER, 1, 1)

__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks; what was written before is seen by all after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The same place in the shared memory of another block.
template <typename P>
__device__ __forceinline__ P* peer(P* pointer, int rank) {
    uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"((uint64_t)pointer), "r"(rank));
    return (P*)address;
}
#else
#define CLUSTER_DIMS
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <typename P>
__device__ __forceinline__ P* peer(P* pointer, int) { return pointer; }
#endif

// ---------------------------------------------------------------------------------------------
// Values in order

__device__ __forceinline__ uint32_t order_of(float value) {
    const uint32_t bits = __float_as_uint(value);
    return bits & 0x80000000u ? bits : 0x7fffffffu - bits;
}

__device__ __forceinline__ float value_of(uint32_t order) {
    return __uint_as_float(order & 0x80000000u ? order : 0x7fffffffu - order);
}

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

// NaN if either is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float c;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}

__device__ __forceinline__ uint32_t max_or_nan_pair(uint32_t a, uint32_t b) {
    uint32_t c;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}

// ---------------------------------------------------------------------------------------------
// The row

// 8 values with ids from a multiple of 8. What lies beyond the row is -inf, once it is clipped.
template <typename T>
struct Group;

template <>
struct Group<bf16> {
    uint32_t pairs[4];

    __device__ __forceinline__ void load(const bf16* row, int id, int size) {
        uint4 packed = make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u);
        if (id < size) packed = *(const uint4*)(row + id);
        pairs[0] = packed.x, pairs[1] = packed.y, pairs[2] = packed.z, pairs[3] = packed.w;
    }
    __device__ __forceinline__ void clip(int id, int size) {
        if (id + 8 <= size) return;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (id + 2 * i >= size) pairs[i] = 0xff80ff80u;
            else if (id + 2 * i + 1 >= size) pairs[i] = (pairs[i] & 0xffffu) | 0xff800000u;
        }
    }
    __device__ __forceinline__ uint32_t high(int i) const {
        return i & 1 ? pairs[i >> 1] >> 16 : pairs[i >> 1] & 0xffffu;
    }
    __device__ __forceinline__ float value(int i) const {
        return i & 1 ? bf16_high(pairs[i >> 1]) : bf16_low(pairs[i >> 1]);
    }
    __device__ __forceinline__ float highest() const {
        const uint32_t pair = max_or_nan_pair(
            max_or_nan_pair(pairs[0], pairs[1]), max_or_nan_pair(pairs[2], pairs[3]));
        return max_or_nan(bf16_low(pair), bf16_high(pair));
    }
};

template <>
struct Group<float> {
    float values[8];

    __device__ __forceinline__ void load(const float* row, int id, int size) {
        float4 a = make_float4(-INFINITY_F, -INFINITY_F, -INFINITY_F, -INFINITY_F), b = a;
        if (id < size) a = *(const float4*)(row + id), b = *(const float4*)(row + id + 4);
        values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
        values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    }
    __device__ __forceinline__ void clip(int id, int size) {
        if (id + 8 <= size) return;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (id + i >= size) values[i] = -INFINITY_F;
    }
    __device__ __forceinline__ uint32_t high(int i) const {
        return __float_as_uint(values[i]) >> 16;
    }
    __device__ __forceinline__ float value(int i) const { return values[i]; }
    __device__ __forceinline__ float highest() const {
        float highest = values[0];
#pragma unroll
        for (int i = 1; i < 8; i++) highest = max_or_nan(highest, values[i]);
        return highest;
    }
};

template <typename T>
struct Row {
    const T* values;
    int size;  // ids from here on do not exist

    static constexpr bool IS_BF16 = sizeof(T) == 2;

    __device__ __forceinline__ float at(int id) const {
        if constexpr (IS_BF16) return bf16_to_float(values[id]);
        else return values[id];
    }

    // The value that stands for orders up to `last` (of one value, if they hold but one).
    static __device__ __forceinline__ float value_at(uint32_t last) {
        const float value = value_of(last);
        return IS_BF16 ? __uint_as_float(__float_as_uint(value) & 0xffff0000u) : value;
    }
};

// Calls f(first id, group) for this block's share of the row, all threads together and each in
// ascending order of ids. Loads run ahead of the calls, in a queue, so that there is one copy of f:
// a loop unrolled around the larger ones would not fit in the instruction cache.
template <typename T, typename F>
__device__ __forceinline__ void for_each(const Row<T>& row, F&& f) {
    constexpr int AHEAD = Row<T>::IS_BF16 ? 4 : 2, STEP = CLUSTER * THREADS * 8;
    const int thread = (cluster_rank() * THREADS + threadIdx.x) * 8;
    Group<T> queue[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) queue[i].load(row.values, i * STEP + thread, row.size);
#pragma unroll 1
    for (int base = 0; base < row.size; base += STEP) {
        Group<T> group = queue[0];
        group.clip(base + thread, row.size);
#pragma unroll
        for (int i = 1; i < AHEAD; i++) queue[i - 1] = queue[i];
        queue[AHEAD - 1].load(row.values, base + AHEAD * STEP + thread, row.size);
        f(base + thread, group);
    }
}

// ---------------------------------------------------------------------------------------------
// Blocks and clusters agree

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

// ---------------------------------------------------------------------------------------------
// Cuts

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
// and gathers each warp's own bins. Returns the row's largest value (NaN if there is a NaN).
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

// ---------------------------------------------------------------------------------------------
// Noise and draws

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

// ---------------------------------------------------------------------------------------------
// Log-probabilities

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

// ---------------------------------------------------------------------------------------------
// One row

// The smallest l / T that the filters keep; NaN for a broken row.
template <typename T>
__device__ __forceinline__ float threshold_of(Row<T> row) {
    const bool has_cut = shared.top_k > 0 || shared.top_p < 1.0f;
    if (!has_cut && !(shared.min_p > 0.0f)) return -INFINITY_F;
    float highest = -INFINITY_F;
    if (has_cut) {
        highest = fill<true>(row, WHOLE_TABLE, LOWEST_ORDER, false);
    } else {
        for_each(row, [&](int, const Group<T>& group) {
            highest = max_or_nan(highest, group.highest());
        });
        highest = cluster_highest(highest);
    }
    if (!(fabsf(highest) < INFINITY_F)) return highest - highest;
    const float largest = highest / shared.temperature;
    float threshold = largest - MAX_NOISE_GAP;
    if (shared.min_p > 0.0f) threshold = fmaxf(threshold, largest + logf(shared.min_p));
    if (!has_cut) return threshold;
    __syncthreads();
    if (threadIdx.x == 0) shared.maximum = highest, shared.largest = largest;
    __syncthreads();
    Cut kept = {LOWEST_ORDER, 1};
    if (shared.top_k > 0) kept = cut(row, kept.limit, shared.top_k);
    if (shared.top_p < 1.0f) {
        if (!Row<T>::IS_BF16 || kept.num_levels > 1)
            fill<true>(row, WHOLE_TABLE, kept.limit, true);
        kept = cut(row, kept.limit, 0);
    }
    return fmaxf(threshold, Row<T>::value_at(kept.limit) / shared.temperature);
}

// The token of a row, in every thread; -1 for a broken row.
template <typename T>
__device__ __noinline__ int sample_row(Row<T> row) {
    Result result = NO_RESULT;
    if (shared.temperature < MIN_TEMPERATURE) {
        result = greedy(row);
    } else {
        const float threshold = threshold_of(row);
        if (threshold == threshold) result = draw_from(row, threshold);
    }
    // The block's result, to the first block.
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        result.join(
            {__shfl_xor_sync(~0u, result.best.value, offset),
             __shfl_xor_sync(~0u, result.best.id, offset)},
            __shfl_xor_sync(~0u, result.highest, offset));
    __syncthreads();
    if ((threadIdx.x & 31) == 0) {
        shared.best[threadIdx.x >> 5] = result.best;
        shared.highest[threadIdx.x >> 5] = result.highest;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < WARPS; warp++)
            result.join(shared.best[warp], shared.highest[warp]);
        for (int rank = 0; rank < CLUSTER; rank++) {
            peer(shared.final_best, rank)[cluster_rank()] = result.best;
            peer(shared.final_highest, rank)[cluster_rank()] = result.highest;
        }
    }
    cluster_sync();
    result = NO_RESULT;
    for (int rank = 0; rank < CLUSTER; rank++)
        result.join(shared.final_best[rank], shared.final_highest[rank]);
    const bool valid = fabsf(result.highest) < INFINITY_F && result.best.value > -INFINITY_F;
    const int token = valid ? result.best.id : -1;
    if (shared.logprobs.ids) {
        if (threadIdx.x == 0)
            shared.temperature = 1.0f, shared.maximum = shared.largest = result.highest;
        __syncthreads();
        write_logprobs(row, token);
    }
    return token;
}

// Rewrites this block's share of a row as floats. Every product and sum is rounded by itself. (Two
// finite biases of one id would be added in any order; the scheduler repeats an id only to ban it.)
__device__ __noinline__ void adjust(float* out, Row<logit> row) {
    const Adjustment& a = shared.adjustment;
    for_each(row, [&](int id, const Group<logit>& group) {
        if (id >= row.size) return;
        uint16_t counts[8];
        if (a.flags & HAS_PENALTIES) {
            if (a.is_aligned) {
                *(uint4*)counts = *(const uint4*)(a.counts + id);
            } else {
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (id + i < row.size) counts[i] = a.counts[id + i];
            }
        }
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float value = group.value(i);
            if (a.flags & HAS_PENALTIES && id + i < row.size) {
                const int generated = counts[i] & COUNT_MASK;
                if (counts[i]) value = value > 0.0f ? value / a.repetition : value * a.repetition;
                const float repeated = __fmul_rn(a.frequency, (float)generated);
                value = __fsub_rn(value, __fadd_rn(repeated, generated ? a.presence : 0.0f));
            }
            if (a.flags & HAS_MASK && id + i < row.size &&
                !(a.mask[(id + i) >> 5] >> ((id + i) & 31) & 1))
                value = -INFINITY_F;
            values[i] = value;
        }
        float4* to = (float4*)(out + id);
        to[0] = make_float4(values[0], values[1], values[2], values[3]);
        to[1] = make_float4(values[4], values[5], values[6], values[7]);
    });
    __syncthreads();
    if (a.flags & HAS_BIAS)
        for (int i = threadIdx.x; i < a.num_bias; i += THREADS) {
            const int id = a.bias_ids[i];
            const bool is_ours = (id / (THREADS * 8)) % CLUSTER == cluster_rank();
            if (id >= 0 && id < row.size && is_ours) atomicAdd(out + id, a.bias_values[i]);
        }
    __syncthreads();
}

extern "C" __global__ void CLUSTER_DIMS __launch_bounds__(THREADS, BLOCKS_PER_SM) sample(
    int* tokens, int* last_token, uint16_t* counts, const logit* logits, float* workspace,
    const uint32_t* masks, const int* mask_rows, int* top_ids, float* top_logprobs, float* chosen_logprobs,
    const float* temperature, const int* top_k, const float* top_p, const float* min_p,
    const uint32_t* seed_lo, const uint32_t* seed_hi, const int* position, const int* slot,
    const float* presence, const float* frequency, const float* repetition, const int* flags,
    const int* bias_start, const int* bias_ids, const float* bias_values, int stride,
    int vocab_limit, int vocab_size) {
    if (CLUSTER > 1) cluster_sync();  // all blocks are there from here on
    pdl_wait();
    const int index = blockIdx.x / CLUSTER;
    const int flag = flags[index];
    const Row<logit> row = {logits + (int64_t)index * stride, vocab_limit};
    if (threadIdx.x == 0) {
        shared.temperature = temperature[index];
        shared.top_k = top_k[index], shared.top_p = top_p[index], shared.min_p = min_p[index];
        shared.position = position[index];
        shared.seed_lo = seed_lo[index], shared.seed_hi = seed_hi[index];
        shared.adjustment = {
            flag, presence[index], frequency[index], repetition[index],
            counts + (int64_t)slot[index] * vocab_size, vocab_size % 8 == 0,
            flag & HAS_MASK ? masks + (int64_t)mask_rows[index] * ceil_div(vocab_size, 32)
                            : nullptr,
            bias_ids + bias_start[index],
            bias_values + bias_start[index], bias_start[index + 1] - bias_start[index]};
        shared.token = tokens + index, shared.last_token = last_token + slot[index];
        shared.logprobs.ids = nullptr;
        if (flag & HAS_LOGPROBS && top_ids)
            shared.logprobs = {
                top_ids + index * NUM_TOP, top_logprobs + index * NUM_TOP, chosen_logprobs + index};
    }
    __syncthreads();

    int token;
    if (flag & (HAS_PENALTIES | HAS_BIAS | HAS_MASK)) {
        float* adjusted = workspace + (int64_t)index * stride;
        adjust(adjusted, row);
        token = sample_row(Row<float>{adjusted, vocab_limit});
    } else {
        token = sample_row(row);
    }
    pdl_launch_dependents();
    if (cluster_rank() != 0 || threadIdx.x != 0) return;
    *shared.token = token;
    *shared.last_token = max(token, 0);
    if (token < 0 || !(shared.adjustment.flags & HAS_PENALTIES)) return;
    uint16_t* count = shared.adjustment.counts + token;
    if ((*count & COUNT_MASK) < COUNT_MASK) ++*count;
}
