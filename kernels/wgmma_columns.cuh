/* wgmma m64nNk16 for N of 16, 32, 48 or 64, chosen by -D COLUMNS.

   d[64 x N] (+)= A B, bf16, float sums; A and B are K-major descriptors of 128B-swizzled tiles
   (hopper.cuh). The descriptors and the predicate come first among the operands, so that the
   numbers of the accumulator's registers do not depend on N: one list, cut off at N. */
#pragma once

#include "hopper.cuh"  // defines: whole_descriptor

#define WGMMA_EIGHT(d, i) \
    "+f"((d)[i]), "+f"((d)[i + 1]), "+f"((d)[i + 2]), "+f"((d)[i + 3]), "+f"((d)[i + 4]), \
        "+f"((d)[i + 5]), "+f"((d)[i + 6]), "+f"((d)[i + 7])

// clang-format off
#define WGMMA_REGISTERS_16 "%3, %4, %5, %6, %7, %8, %9, %10"
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_16 ", %11, %12, %13, %14, %15, %16, %17, %18"
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_32 ", %19, %20, %21, %22, %23, %24, %25, %26"
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_48 ", %27, %28, %29, %30, %31, %32, %33, %34"
#define WGMMA_OPERANDS_16(d) WGMMA_EIGHT(d, 0)
#define WGMMA_OPERANDS_32(d) WGMMA_OPERANDS_16(d), WGMMA_EIGHT(d, 8)
#define WGMMA_OPERANDS_48(d) WGMMA_OPERANDS_32(d), WGMMA_EIGHT(d, 16)
#define WGMMA_OPERANDS_64(d) WGMMA_OPERANDS_48(d), WGMMA_EIGHT(d, 24)
// clang-format on

#define WGMMA_PASTE_(a, b) a##b
#define WGMMA_PASTE(a, b) WGMMA_PASTE_(a, b)
#define WGMMA_TEXT_(x) #x
#define WGMMA_TEXT(x) WGMMA_TEXT_(x)

// a, b: low words of descriptors. accumulate 0 overwrites d.
__device__ __forceinline__ void wgmma_columns(
    float (&d)[COLUMNS / 2], uint32_t a, uint32_t b, int accumulate) {
    uint64_t whole_a = whole_descriptor(a), whole_b = whole_descriptor(b);
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %2, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" WGMMA_TEXT(COLUMNS) "k16.f32.bf16.bf16 {"
        WGMMA_PASTE(WGMMA_REGISTERS_, COLUMNS)
        "}, %0, %1, p, 1, 1, 0, 0;\n}\n"
        : "+l"(whole_a), "+l"(whole_b), "+r"(accumulate), WGMMA_PASTE(WGMMA_OPERANDS_, COLUMNS)(d));
}
