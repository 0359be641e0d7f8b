/*
The sampler: one token per row of logits, in one launch, with no sort and no host.

The rules are those of backend/sampling.py, number for number: penalties, bias, mask; greedy, or
temperature with top-k, top-p and min-p, and the token is the argmax of l / T + Gumbel noise, where
the noise of an id is Philox4x32-10 of (id, position) under the request's seed. So a row's token
depends on nothing but the row.

One block works on one row:
  adjust   rows with penalties, bias or mask are first rewritten as floats in a workspace
  plain    greedy and pure temperature: one pass over the row, done
  filtered one pass counts the row in bins of the top 16 bits of its values. bf16 logits fall in bins
           of one value each, so the bins alone give the exact thresholds of top-k and top-p: the
           mass of a bin is its count times one exponential. (Adjusted rows are floats: their bins
           carry a fixed-point mass, and two finer levels narrow a threshold to one value.)
           A last pass takes the argmax over what is kept.
Sums are integers or taken in a fixed order: equal bits on every run.

The bins are in descending order of value: 28 octaves of 128 positive bf16 values, one bin for
everything smaller than 2^-12 in magnitude (one value, as far as thresholds go), 28 octaves down.
`order` maps a float to an integer that ascends as the value descends, so "kept" is order <= limit.

Launch: grid (num_rows), block 512, SHARED_BYTES of dynamic shared memory. LOGIT_FLOAT = 0: bf16
logits, 1: float. stride (values per row) a multiple of 8. Programmatic dependent launch is allowed.
*/
#include "common.cuh"  // defines: bf16, ceil_div, pdl_wait, pdl_launch_dependents

#define THREADS 512
#define WARPS (THREADS / 32)
#define SIDE_BINS (28 * 128)          // positive, or negative, bins
#define SMALLEST ((127 - 12) << 7)    // top bits of 2^-12
#define NUM_BINS (2 * SIDE_BINS + 1)
#define BINS_PER_THREAD ((NUM_BINS + THREADS - 1) / THREADS)
#define ALLOCATED_BINS (BINS_PER_THREAD * THREADS)
#define SHARED_BYTES (3 * ALLOCATED_BINS * 4)

#define HAS_PENALTIES 1
#define HAS_BIAS 2
#define HAS_MASK 4
#define IN_PROMPT 0x4000
#define COUNT_MASK 0x3fff

#define LOWEST_FINITE_ORDER 0xff7fffffu  // order of the most negative finite float
#define MASS_BITS 28
#define MAX_NOISE 16.7f
#define MIN_TEMPERATURE 1e-5f  // below: greedy

#if LOGIT_FLOAT
typedef float logit;
#else
typedef bf16 logit;
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

__device__ __forceinline__ int bin_of(float value) {
    const uint32_t high = __float_as_uint(value) >> 16;
    const int step = (int)(high & 0x7fff) - SMALLEST;
    if (step < 0) return SIDE_BINS;
    const int clamped = min(step, SIDE_BINS - 1);
    return high & 0x8000 ? SIDE_BINS + 1 + clamped : SIDE_BINS - 1 - clamped;
}

// First and last order of a bin: its largest and its smallest value.
__device__ __forceinline__ uint32_t bin_first(int bin) {
    if (bin == 0) return 0;
    if (bin < SIDE_BINS) return (0x7fffu - (SMALLEST + SIDE_BINS - 1 - bin)) << 16;
    if (bin == SIDE_BINS) return (0x7fffu - SMALLEST + 1) << 16;
    return (0x8000u | (SMALLEST + bin - SIDE_BINS - 1)) << 16;
}

__device__ __forceinline__ uint32_t bin_last(int bin) {
    return bin + 1 < NUM_BINS ? bin_first(bin + 1) - 1 : LOWEST_FINITE_ORDER;
}

// ---------------------------------------------------------------------------------------------
// Noise

__device__ __forceinline__ uint4 philox(uint32_t block, uint32_t position, uint32_t k0, uint32_t k1) {
    uint4 c = make_uint4(block, position, 0, 0);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
        c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

__device__ __forceinline__ float gumbel(uint32_t word) {
    const float u = ((float)(word >> 9) + 0.5f) * 1.1920928955078125e-07f;
    return -logf(-logf(u));
}

// No more than this, without a logarithm: -log(-log(u)) <= -log(1 - u) <= log(2) * (zeros of 1 - u).
__device__ __forceinline__ float gumbel_bound(uint32_t word) {
    return 0.6932f * (float)(__clz(~word | 511u) + 1);
}

struct Best {
    float value;
    int id;
};

__device__ __forceinline__ void take(Best& best, float value, int id) {
    if (value > best.value || (value == best.value && id < best.id)) best = {value, id};
}

// ---------------------------------------------------------------------------------------------
// The row

struct Row {
    const logit* logits;
    const float* adjusted;  // null: the logits as they are
    int size;               // ids from here on do not exist

    // 8 values from a multiple of 8; what lies beyond the row is -inf.
    __device__ __forceinline__ void load(int id, float (&v)[8]) const {
#if LOGIT_FLOAT
        const float* source = adjusted ? adjusted : logits;
#else
        if (!adjusted) {
            const uint4 packed = *(const uint4*)(logits + id);
            const uint32_t pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                v[2 * i] = bf16_low(pairs[i]);
                v[2 * i + 1] = bf16_high(pairs[i]);
            }
            clip(id, v);
            return;
        }
        const float* source = adjusted;
#endif
        const float4 a = *(const float4*)(source + id), b = *(const float4*)(source + id + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        clip(id, v);
    }

    __device__ __forceinline__ void clip(int id, float (&v)[8]) const {
        if (id + 8 <= size) return;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (id + i >= size) v[i] = -INFINITY_F;
    }
};

// Calls f(first id, 8 values) for the whole row, all threads together.
template <typename F>
__device__ __forceinline__ void for_each(const Row& row, F&& f) {
#pragma unroll 2
    for (int id = threadIdx.x * 8; id < row.size; id += THREADS * 8) {
        float v[8];
        row.load(id, v);
        f(id, v);
    }
}

// ---------------------------------------------------------------------------------------------
// Blocks of threads agree

struct Shared {
    float best_value[WARPS];
    int best_id[WARPS];
    uint32_t count[WARPS];
    float mass[WARPS];
    int last;              // last bin that is not empty
    int found;             // find_bin's answer: the bin that crosses the target,
    uint32_t count_above;  // what the bins above it hold,
    float mass_above;
    float mass_inside;     // and the bin itself
};

__device__ __forceinline__ Best block_best(Shared& shared, Best best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        const float value = __shfl_xor_sync(~0u, best.value, offset);
        const int id = __shfl_xor_sync(~0u, best.id, offset);
        take(best, value, id);
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0) {
        shared.best_value[threadIdx.x >> 5] = best.value;
        shared.best_id[threadIdx.x >> 5] = best.id;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++)
        take(best, shared.best_value[warp], shared.best_id[warp]);
    return best;
}

// ---------------------------------------------------------------------------------------------
// Thresholds

// The bins of one level, in shared memory. A float row's mass is fixed-point, in two words of 14 bits
// a value, relative to the largest value of the bin; a bf16 row's follows from the count.
struct Bins {
    uint32_t* count;
    uint32_t* low;
    uint32_t* high;
    bool exact;        // every bin is one value: a bf16 row
    float maximum;     // of the row
    float inverse_t;   // log2(e) / temperature

    __device__ __forceinline__ float weight(float value) const {
        return exp2f((fminf(value, maximum) - maximum) * inverse_t);
    }

    __device__ __forceinline__ void clear(int num_bins) const {
        __syncthreads();
        for (int i = threadIdx.x; i < num_bins; i += THREADS) {
            count[i] = 0;
            if (!exact) low[i] = high[i] = 0;
        }
        __syncthreads();
    }

    __device__ __forceinline__ void add(int bin, float value, uint32_t first) const {
        atomicAdd(count + bin, 1);
        if (exact) return;
        const float top = fminf(value_of(first), maximum);
        const uint32_t mass =
            (uint32_t)(exp2f((value - top) * inverse_t) * (float)(1 << MASS_BITS) + 0.5f);
        atomicAdd(low + bin, mass & 0x3fff);
        atomicAdd(high + bin, mass >> 14);
    }

    __device__ __forceinline__ float mass(int bin, uint32_t first) const {
        if (count[bin] == 0) return 0.0f;
        const float top = weight(value_of(first));
        if (exact) return (float)count[bin] * top;
        const float scale = 1.0f / (float)(1 << MASS_BITS);
        return ((float)high[bin] * 16384.0f + (float)low[bin]) * scale * top;
    }
};

// The first bin, from the top, where the running count (or mass) reaches its target; the last
// non-empty bin if none does. Leaves it in `shared`, with what is above it and inside.
// `first_of(bin)` is the order of the bin's largest value.
template <typename First>
__device__ void find_bin(
    Shared& shared, const Bins& bins, int num_bins, bool by_mass, uint32_t count_target,
    float mass_target, uint32_t count_above, float mass_above, First&& first_of) {
    const int per_thread = ceil_div(num_bins, THREADS);
    const int begin = threadIdx.x * per_thread, end = min(begin + per_thread, num_bins);
    uint32_t count = 0;
    float mass = 0.0f;
    for (int bin = begin; bin < end; bin++) {
        count += bins.count[bin];
        mass += bins.mass(bin, first_of(bin));
    }
    // Prefix over threads: within the warp, then over warps.
    uint32_t count_sum = count;
    float mass_sum = mass;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        const uint32_t c = __shfl_up_sync(~0u, count_sum, offset);
        const float m = __shfl_up_sync(~0u, mass_sum, offset);
        if (lane >= offset) count_sum += c, mass_sum += m;
    }
    if (lane == 31) shared.count[warp] = count_sum, shared.mass[warp] = mass_sum;
    if (threadIdx.x == 0) shared.found = num_bins, shared.last = -1;
    __syncthreads();
    for (int w = 0; w < warp; w++) count_above += shared.count[w], mass_above += shared.mass[w];
    count_above += count_sum - count;
    mass_above += mass_sum - mass;
    // Each thread proposes its first bin that reaches the target, and its last one that is not
    // empty; the block settles on one by its number, so rounding between threads cannot lose it.
    for (int attempt = 0; attempt < 2; attempt++) {
        uint32_t c = count_above;
        float m = mass_above;
        for (int bin = begin; bin < end; bin++) {
            const uint32_t here = bins.count[bin];
            if (here == 0) continue;
            const float mass_here = bins.mass(bin, first_of(bin));
            if (attempt == 0) {
                atomicMax(&shared.last, bin);
                if (by_mass ? m + mass_here >= mass_target : c + here >= count_target)
                    atomicMin(&shared.found, bin);
            } else if (bin == shared.found) {
                shared.count_above = c, shared.mass_above = m;
                shared.mass_inside = mass_here;
            }
            c += here;
            m += mass_here;
        }
        __syncthreads();
        if (attempt == 0 && threadIdx.x == 0 && shared.found == num_bins)
            shared.found = shared.last;
        __syncthreads();
    }
}

// Which values of a row are kept: those whose order is at most `limit`. `mass` is theirs.
struct Cut {
    uint32_t limit;
    float mass;
};

__device__ void count_row(const Row& row, const Bins& bins) {
    bins.clear(ALLOCATED_BINS);
    for_each(row, [&](int, float(&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (v[i] == -INFINITY_F) continue;
            const int bin = bin_of(v[i]);
            bins.add(bin, v[i], bin_first(bin));
        }
    });
    __syncthreads();
}

// The smallest set of largest values that holds `count_target` values (or `mass_target`), ties
// included. The bins hold the row already; for a float row they are overwritten.
__device__ Cut find_cut(
    Shared& shared, const Row& row, const Bins& bins, bool by_mass, uint32_t count_target,
    float mass_target) {
    find_bin(shared, bins, NUM_BINS, by_mass, count_target, mass_target, 0, 0.0f, bin_first);
    const int bin = shared.found;
    const bool one_value = bins.exact || bin == 0 || bin == SIDE_BINS || bin == NUM_BINS - 1;
    if (one_value) return {bin_last(bin), shared.mass_above + shared.mass_inside};
    uint32_t first = bin_first(bin);
#pragma unroll 1
    for (int shift = 5; shift >= 0; shift -= 5) {
        const int num_bins = shift == 5 ? 2048 : 32;
        const uint32_t count_above = shared.count_above;
        const float mass_above = shared.mass_above;
        bins.clear(num_bins);
        for_each(row, [&](int, float(&v)[8]) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32_t fine = (order_of(v[i]) - first) >> shift;
                if (fine < num_bins) bins.add(fine, v[i], first + (fine << shift));
            }
        });
        __syncthreads();
        find_bin(
            shared, bins, num_bins, by_mass, count_target, mass_target, count_above, mass_above,
            [=](int fine) { return first + ((uint32_t)fine << shift); });
        first += (uint32_t)shared.found << shift;
    }
    return {first, shared.mass_above + shared.mass_inside};
}

// ---------------------------------------------------------------------------------------------
// The kinds of rows

struct Draw {
    float temperature;
    uint32_t position, seed_lo, seed_hi;

    __device__ __forceinline__ float noisy(float value, uint32_t word) const {
        return value / temperature + gumbel(word);
    }
};

__device__ __forceinline__ uint32_t word_of(const uint4& words, int index) {
    return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

__device__ Best greedy(const Row& row, bool& broken) {
    Best best = {-INFINITY_F, 0x7fffffff};
    for_each(row, [&](int id, float(&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            broken |= !(v[i] < INFINITY_F);
            take(best, v[i], id + i);
        }
    });
    return best;
}

__device__ Best draw_from_all(const Row& row, const Draw& draw, bool& broken) {
    Best best = {-INFINITY_F, 0x7fffffff};
    const float inverse = 1.0f / draw.temperature;
    for_each(row, [&](int id, float(&v)[8]) {
        float highest = -INFINITY_F;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            broken |= !(v[i] < INFINITY_F);
            highest = fmaxf(highest, v[i]);
        }
        // The slack covers the rounding of the product against the division.
        const float slack = 1e-3f + 1e-6f * fabsf(best.value);
        if (highest * inverse + MAX_NOISE + slack < best.value) return;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 words = philox((id >> 2) + half, draw.position, draw.seed_lo, draw.seed_hi);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float value = v[4 * half + i];
                const uint32_t word = word_of(words, i);
                if (value * inverse + gumbel_bound(word) + slack < best.value) continue;
                if (value > -INFINITY_F) take(best, draw.noisy(value, word), id + 4 * half + i);
            }
        }
    });
    return best;
}

__device__ Best draw_from_filtered(
    Shared& shared, const Row& row, const Draw& draw, Bins bins, int top_k, float top_p,
    float min_p, float maximum) {
    bins.maximum = maximum;
    bins.inverse_t = LOG2E / draw.temperature;
    uint32_t limit = LOWEST_FINITE_ORDER;
    if (top_k > 0 || top_p < 1.0f) {
        count_row(row, bins);
        Cut cut;
        if (top_k > 0) {
            cut = find_cut(shared, row, bins, false, top_k, 0.0f);
            if (top_p < 1.0f && !bins.exact) count_row(row, bins);
        } else {
            find_bin(shared, bins, NUM_BINS, false, ~0u, 0.0f, 0, 0.0f, bin_first);
            cut = {LOWEST_FINITE_ORDER, shared.mass_above + shared.mass_inside};
        }
        limit = cut.limit;
        if (top_p < 1.0f)
            limit = min(limit, find_cut(shared, row, bins, true, 0, top_p * cut.mass).limit);
    }
    const float lowest =
        min_p > 0.0f ? maximum / draw.temperature + logf(min_p) : -INFINITY_F;
    Best best = {-INFINITY_F, 0x7fffffff};
    for_each(row, [&](int id, float(&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (order_of(v[i]) > limit || v[i] / draw.temperature < lowest) continue;
            const uint4 words = philox((id + i) >> 2, draw.position, draw.seed_lo, draw.seed_hi);
            take(best, draw.noisy(v[i], word_of(words, i & 3)), id + i);
        }
    });
    return best;
}

__device__ float row_maximum(Shared& shared, const Row& row, bool& broken) {
    float highest = -INFINITY_F;
    for_each(row, [&](int, float(&v)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            broken |= !(v[i] < INFINITY_F);
            highest = fmaxf(highest, v[i]);
        }
    });
    return block_best(shared, {highest, 0}).value;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) sample(
    int* tokens, int* last_token, uint16_t* counts, const logit* logits, float* workspace,
    const uint32_t* masks, const float* temperature, const int* top_k, const float* top_p,
    const float* min_p, const uint32_t* seed_lo, const uint32_t* seed_hi, const int* position,
    const int* slot, const float* presence, const float* frequency, const float* repetition,
    const int* flags, const int* bias_start, const int* bias_ids, const float* bias_values,
    int stride, int vocab_limit, int vocab_size) {
    extern __shared__ uint32_t bin_memory[];
    __shared__ Shared shared;
    pdl_wait();
    const int index = blockIdx.x;
    const int flag = flags[index];
    uint16_t* count = counts + (int64_t)slot[index] * vocab_size;
    Row row = {logits + (int64_t)index * stride, nullptr, vocab_limit};

    if (flag) {
        float* adjusted = workspace + (int64_t)index * stride;
        const uint32_t* mask = masks + (int64_t)index * ceil_div(vocab_size, 32);
        const float r = repetition[index], f = frequency[index], p = presence[index];
        for_each(row, [&](int id, float(&v)[8]) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (id + i >= vocab_limit) break;
                float value = v[i];
                if (flag & HAS_PENALTIES) {
                    const int seen = count[id + i], generated = seen & COUNT_MASK;
                    if (seen) value = value > 0.0f ? value / r : value * r;
                    value -= f * generated + (generated ? p : 0.0f);
                }
                if (flag & HAS_MASK && !(mask[(id + i) >> 5] >> ((id + i) & 31) & 1))
                    value = -INFINITY_F;
                adjusted[id + i] = value;
            }
        });
        __syncthreads();
        if (flag & HAS_BIAS)
            for (int i = bias_start[index] + threadIdx.x; i < bias_start[index + 1]; i += THREADS)
                if (bias_ids[i] < vocab_limit) atomicAdd(adjusted + bias_ids[i], bias_values[i]);
        __syncthreads();
        row.adjusted = adjusted;
    }

    const Draw draw = {temperature[index], (uint32_t)position[index], seed_lo[index], seed_hi[index]};
    const int k = top_k[index];
    const float p = top_p[index], m = min_p[index];
    bool broken = false;
    Best best;
    if (draw.temperature < MIN_TEMPERATURE) {
        best = greedy(row, broken);
    } else if (k <= 0 && p >= 1.0f && m <= 0.0f) {
        best = draw_from_all(row, draw, broken);
    } else {
        const float maximum = row_maximum(shared, row, broken);
        broken = __syncthreads_or(broken);
        Bins bins = {bin_memory, bin_memory + ALLOCATED_BINS, bin_memory + 2 * ALLOCATED_BINS,
                     !LOGIT_FLOAT && row.adjusted == nullptr, 0.0f, 0.0f};
        best = {-INFINITY_F, 0x7fffffff};
        if (!broken && maximum > -INFINITY_F)
            best = draw_from_filtered(shared, row, draw, bins, k, p, m, maximum);
    }
    broken = __syncthreads_or(broken);
    best = block_best(shared, best);
    pdl_launch_dependents();
    if (threadIdx.x != 0) return;
    const bool valid = !broken && best.value > -INFINITY_F;
    tokens[index] = valid ? best.id : -1;
    last_token[slot[index]] = valid ? best.id : 0;
    if (valid && flag & HAS_PENALTIES && (count[best.id] & COUNT_MASK) < COUNT_MASK)
        count[best.id]++;
}
