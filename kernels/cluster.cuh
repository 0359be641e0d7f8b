/*
Blocks of a cluster that send each other sums (sm_90 and newer): into the shared memory of a peer,
whose mbarrier counts the bytes. No fence is needed: one of cluster scope, as `barrier.cluster` has it
by default, drains the memory system and the loads of a ring with it.
*/
#pragma once

#include "common.cuh"  // defines: integer types

#if HAS_BULK_COPY

// Tells nothing but that the threads are there; initialised mbarriers have a fence of their own.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait;" ::: "memory");
}

// The same place in the shared memory of another block of the cluster.
__device__ __forceinline__ uint32_t peer_address(uint32_t shared, int rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
    return address;
}

// Both addresses: of peer_address, of the same rank.
__device__ __forceinline__ void send_to_peer(uint32_t address, float4 v, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1,%2,%3,%4}, "
        "[%5];" ::"r"(address),
        "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void send_to_peer(uint32_t address, float2 v, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1,%2}, [%3];" ::"r"(
            address),
        "f"(v.x), "f"(v.y), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void send_to_peer(uint32_t address, float v, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
            address),
        "f"(v), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}

#endif
