/*
Words that are their own message from one block to another, through global memory.

A word lies UNWRITTEN until its writer puts something there, and a taker asks for it until that is so:
there is neither a fence nor a flag, each of which would cost a way through the memory system. Whoever
takes it last puts it back, UNWRITTEN for the next launch. Who wants many asks for all of them at once,
and if one is not there for all of them again: that costs one way each time, not one a word.
*/
#pragma once

#include "common.cuh"  // defines: uint32_t

constexpr uint32_t UNWRITTEN = 0xffffffff;
constexpr uint32_t NOT_A_NUMBER = 0x7fffffff;

// UNWRITTEN if a word is, less if none is: the highest of many says whether all are there.
__device__ __forceinline__ uint32_t highest(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t highest(float2 x) { return max(highest(x.x), highest(x.y)); }
__device__ __forceinline__ uint32_t highest(float4 x) {
    return max(max(highest(x.x), highest(x.y)), max(highest(x.z), highest(x.w)));
}

// What may be put for x: a NaN that is not UNWRITTEN, if x is one.
__device__ __forceinline__ uint32_t written(float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits == UNWRITTEN ? NOT_A_NUMBER : bits;
}

__device__ __forceinline__ void put_bits(float* to, uint32_t x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x));
}
__device__ __forceinline__ void put_bits(float2* to, uint32_t x, uint32_t y) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1,%2};" ::"l"(to), "r"(x), "r"(y));
}
__device__ __forceinline__ void put_bits(
    float4* to, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x), "r"(y),
                 "r"(z), "r"(w));
}

__device__ __forceinline__ void put(float* to, float x) { put_bits(to, written(x)); }
__device__ __forceinline__ void put(float2* to, float2 x) {
    put_bits(to, written(x.x), written(x.y));
}
__device__ __forceinline__ void put(float4* to, float4 x) {
    put_bits(to, written(x.x), written(x.y), written(x.z), written(x.w));
}

__device__ __forceinline__ void put_back(float* to) { put_bits(to, UNWRITTEN); }
__device__ __forceinline__ void put_back(float2* to) { put_bits(to, UNWRITTEN, UNWRITTEN); }
__device__ __forceinline__ void put_back(float4* to) {
    put_bits(to, UNWRITTEN, UNWRITTEN, UNWRITTEN, UNWRITTEN);
}

__device__ __forceinline__ float ask(const float* from) {
    float x;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}
__device__ __forceinline__ float2 ask(const float2* from) {
    float2 x;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];"
                 : "=f"(x.x), "=f"(x.y)
                 : "l"(from));
    return x;
}
__device__ __forceinline__ float4 ask(const float4* from) {
    float4 x;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(from));
    return x;
}
