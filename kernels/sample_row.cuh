/*
A row of logits, read by a cluster of CLUSTER blocks of THREADS threads that see each other's shared
memory: 8 neighbours a thread and turn, in ascending order of ids.

`order_of` maps a float to an integer that ascends as the value descends, so "kept" is
order <= limit. LOGIT_FLOAT = 0: bf16 logits, 1: float.
*/
#pragma once
#include "common.cuh"  // defines: bf16, bf16_low, bf16_high, bf16_to_float

#define THREADS 512
#define WARPS (THREADS / 32)

#if LOGIT_FLOAT
typedef float logit;
#else
typedef bf16 logit;
#endif

// ---------------------------------------------------------------------------------------------
// The cluster

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
