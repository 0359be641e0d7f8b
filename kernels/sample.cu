/*
The sampler: one token per row of logits, in one launch, with no sort and no host.

The rules are those of backend/sampling.py, number for number: penalties, bias, mask; greedy, or
temperature with top-k, top-p and min-p, and the token is the argmax of l / T + Gumbel noise, where
the noise of an id is Philox4x32-10 of (id, position) under the request's seed. So a row's token
depends on nothing but the row.

A cluster of CLUSTER blocks works on one row (1: one block; more when there are few rows):
  adjust   rows with penalties, bias or mask are first rewritten as floats in a workspace
  argmax   greedy: one pass over the row, done
  cut      rows with top-k or top-p: one pass counts the row in bins, and the counts give the
           threshold (sample_cut.cuh)
  draw     one pass, argmax of value + noise over what is kept (sample_draw.cuh)
  logprobs rows that ask: log-sum-exp and the largest NUM_TOP logits (sample_logprobs.cuh)
Equal bits on every run and for every cluster size.

masks: bit id % 32 of word id / 32 of row mask_rows[i] says that sample i may be that id.

Launch: grid (num_rows * CLUSTER), block 512, SHARED_BYTES of dynamic shared memory. LOGIT_FLOAT = 0:
bf16 logits, 1: float. stride (values per row) a multiple of 8, vocab_limit <= stride and at most
2^18. CLUSTER > 1 needs sm_90. Programmatic dependent launch is allowed.
*/
#include "common.cuh"           // defines: ceil_div, pdl_wait, pdl_launch_dependents
#include "sample_cut.cuh"       // defines: fill, cut, SHARED_BYTES
#include "sample_draw.cuh"      // defines: greedy, draw_from, Result
#include "sample_logprobs.cuh"  // defines: write_logprobs

#define BLOCKS_PER_SM (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 ? 2 : 1)  // by SHARED_BYTES

#define HAS_PENALTIES 1
#define HAS_BIAS 2
#define HAS_MASK 4
#define HAS_LOGPROBS 8
#define COUNT_MASK 0x3fff

#define MAX_NOISE_GAP 21.0f    // an id this far below the largest cannot win
#define MIN_TEMPERATURE 1e-5f  // below: greedy

// The smallest l / T that the filters keep; NaN for a broken row.
template <typename T>
__device__ __forceinline__ float threshold_of(Row<T> row) {
    const bool has_cut = shared.top_k > 0 || shared.top_p < 1.0f;
    if (!has_cut && !(shared.min_p > 0.0f)) return -INFINITY_F;
    // Counts give both thresholds of bf16, but top-p of floats needs masses, after their maximum.
    const bool has_counts = shared.top_k > 0 || (has_cut && Row<T>::IS_BF16);
    float highest = -INFINITY_F;
    if (has_counts) {
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

// Rewrites this block's share of a row as floats: the row. Every product and sum is rounded by itself. (Two
// finite biases of one id would be added in any order; the scheduler repeats an id only to ban it.)
__device__ __noinline__ Row<float> adjust(float* out, Row<logit> row) {
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
    return {out, row.size};
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
        token = sample_row(adjust(workspace + (int64_t)index * stride, row));
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
