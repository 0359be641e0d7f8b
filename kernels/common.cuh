/*
Helpers that every kernel shares: integer types, bf16, warp reductions, the swizzled KV page, and
the PTX that has no C++ spelling (ldmatrix, mma, cp.async, bulk copies, mbarriers, PDL).

Kernels include nothing but files of this folder: NVRTC builds them without CUDA headers.
`bf16` is two bytes of storage; arithmetic on it is done in float and rounded to nearest even.
*/
#pragma once

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef uint16_t bf16;

#define INFINITY_F __int_as_float(0x7f800000)
#define LOG2E 1.4426950408889634f
#ifndef HAS_BULK_COPY  // the tests set it to 0, to run the paths of older chips on a new one
#define HAS_BULK_COPY (__CUDA_ARCH__ >= 900)  // mbarrier transactions, cp.async.bulk, PDL
#endif

// ---------------------------------------------------------------------------------------------
// bf16

__device__ __forceinline__ float bf16_to_float(bf16 x) {
    return __uint_as_float((uint32_t)x << 16);
}

// The low and the high half of a pair as it lies in memory.
__device__ __forceinline__ float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ bf16 float_to_bf16(float x) {
    return (bf16)pack_bf16(x, 0.0f);
}

// A float rounded to what bf16 can hold.
__device__ __forceinline__ float round_bf16(float x) { return bf16_low(pack_bf16(x, 0.0f)); }

// Pairs: each product or sum rounded once, as if computed in float and rounded.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
__device__ __forceinline__ uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
    return fma_bf16x2(a, b, 0x80008000u);  // plus minus zero: keeps the sign of a zero product
}
__device__ __forceinline__ uint32_t add_bf16x2(uint32_t a, uint32_t b) {
    return fma_bf16x2(a, 0x3f803f80u, b);
}

// ---------------------------------------------------------------------------------------------
// Math and warps

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + exp2_fast(-x * LOG2E)); }

// The sum of the squares of a pair, and of 8 bf16.
__device__ __forceinline__ float squares_of(uint32_t pair) {
    return bf16_low(pair) * bf16_low(pair) + bf16_high(pair) * bf16_high(pair);
}
__device__ __forceinline__ float squares_of(uint4 v) {
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += squares_of(pairs[i]);
    return sum;
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}

// Over the four lanes that share the rows of an MMA's accumulators.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A thread's share of a row's sum of squares, where THREADS share it: BATCH loads of 16 bytes are under
// way at once, from L2. size: a multiple of 8.
template <int THREADS, int BATCH>
__device__ __forceinline__ float share_of_squares(const bf16* row, int size, int thread) {
    const uint4* from = (const uint4*)row;
    float sum = 0.0f;
    for (int first = thread; first < size / 8; first += THREADS * BATCH) {
        uint4 loaded[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int at = first + THREADS * i;
            loaded[i] = at < size / 8 ? __ldcg(from + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) sum += squares_of(loaded[i]);
    }
    return sum;
}

// 1 / rms of a row of bf16, in all threads of a block of BLOCK (each calls it once a kernel). The
// product of a normed row is that of the row times this: products come first, and who takes them
// scales. size: a multiple of 8.
template <int BLOCK>
__device__ __forceinline__ float inverse_rms(const bf16* row, int size, float eps) {
    __shared__ float partial[BLOCK / 32];
    float sum = 0.0f;
    for (int i = threadIdx.x * 8; i < size; i += BLOCK * 8) sum += squares_of(*(const uint4*)(row + i));
    sum = warp_sum(sum);
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < BLOCK / 32; warp++) sum += partial[warp];
    return rsqrtf(sum / size + eps);
}

__device__ __forceinline__ uint32_t scale_pair(uint32_t pair, float scale) {
    return pack_bf16(bf16_low(pair) * scale, bf16_high(pair) * scale);
}

// weight * round(pair * scale), rounded: a norm as transformers has it.
__device__ __forceinline__ uint32_t norm_pair(uint32_t pair, float scale, uint32_t weight) {
    return mul_bf16x2(weight, scale_pair(pair, scale));
}

constexpr uint32_t MINUS_ZEROS = 0x80008000u;  // a pair whose addition changes no bit

__device__ __forceinline__ uint32_t scale_and_add(uint32_t pair, float scale, uint32_t added) {
    return pack_bf16(
        bf16_low(pair) * scale + bf16_low(added), bf16_high(pair) * scale + bf16_high(added));
}

// ---------------------------------------------------------------------------------------------
// The KV page: kv[page][kv_head][K|V][half][row in page][128 bytes]
//
// One layer's cache. A half is 64 dims (head_dim 64 has one, 128 has two); the eight 16-byte chunks
// of a row are stored at chunk ^ (row & 7). A (page, head, K|V, half) block is one contiguous run
// that lands in shared memory as the 128-byte swizzle wants it (wgmma, conflict-free ldmatrix).

// Byte offset of a (page, head, K|V) block in a layer's cache.
__device__ __forceinline__ int64_t kv_block_offset(
    int page, int head, int is_v, int num_kv_heads, int page_size, int head_dim) {
    return (((int64_t)page * num_kv_heads + head) * 2 + is_v) * (page_size * head_dim * 2);
}

// Byte offset of a 16-byte chunk of one row in its block; chunk counts over all dims of the head:
// dims 8 * chunk .. 8 * chunk + 7.
__device__ __forceinline__ int kv_chunk_offset(int row, int chunk, int page_size) {
    return (chunk >> 3) * page_size * 128 + row * 128 + (((chunk & 7) ^ (row & 7)) << 4);
}

// ---------------------------------------------------------------------------------------------
// Shared memory, ldmatrix, mma.sync

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// Transposes the 8x8 matrix of 16-bit elements that a warp holds, one row pair a lane.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
    uint32_t y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// D[16x8] += A[16x16] B[16x8], bf16 in, float accumulators.
// Lane 4g+t: A = rows g, g+8, g, g+8, cols 2t(+8 for the last two); B = rows 2t, 2t+8 of col g;
// D = row g cols 2t, 2t+1, then row g+8.
__device__ __forceinline__ void mma_bf16(
    float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---------------------------------------------------------------------------------------------
// Asynchronous copies of sm_80: 16 bytes a lane

__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// Writes zeros instead when `valid` is false (and does not read).
__device__ __forceinline__ void cp_async_16_or_zero(
    uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---------------------------------------------------------------------------------------------
// mbarriers and bulk copies (sm_90 and newer)

#if HAS_BULK_COPY

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals)
                 : "memory");
}

// Makes the inits of this thread visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra again;\n"
        "finished:\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Global to shared, size and both addresses multiples of 16; completes on the mbarrier.
__device__ __forceinline__ void bulk_copy(
    uint32_t shared, const void* global, int bytes, uint32_t barrier, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

__device__ __forceinline__ uint64_t policy_evict_first() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ uint64_t policy_evict_last() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Orders this thread's ordinary shared-memory accesses with the copy engine's and wgmma's.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

// ---------------------------------------------------------------------------------------------
// Programmatic dependent launch; nothing on older chips

// Reads that stay before pdl_wait: ptxas moves the wait above reads through the constant path (what
// a const __restrict__ pointer gives), but not above these.
__device__ __forceinline__ int load_before_wait(const int* pointer) {
    int x;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(pointer));
    return x;
}
__device__ __forceinline__ uint32_t load_before_wait(const uint32_t* pointer) {
    uint32_t x;
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(x) : "l"(pointer));
    return x;
}
__device__ __forceinline__ float2 load_before_wait(const float2* pointer) {
    float2 x;
    asm volatile("ld.global.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(pointer));
    return x;
}
__device__ __forceinline__ float4 load_before_wait(const float4* pointer) {
    float4 x;
    asm volatile("ld.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "l"(pointer));
    return x;
}
__device__ __forceinline__ uint4 load_before_wait(const uint4* pointer) {
    uint4 x;
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(pointer));
    return x;
}

// Waits for the kernels before this one; what touches memory that they write comes after.
__device__ __forceinline__ void pdl_wait() {
#if HAS_BULK_COPY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start; their pdl_wait still waits for all of this grid, and so for all
// before it. After pdl_wait, so that a block knows before its own wait that the kernel two before its own
// is complete. gemm_small alone may be earlier: behind it, only what came before the step's first product
// is known to be.
__device__ __forceinline__ void pdl_launch_dependents() {
#if HAS_BULK_COPY
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
