/* wgmma m64nNk16 for any N that is a multiple of 16 up to 256, chosen by -D COLUMNS.

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
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_64 ", %35, %36, %37, %38, %39, %40, %41, %42"
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_80 ", %43, %44, %45, %46, %47, %48, %49, %50"
#define WGMMA_REGISTERS_112 WGMMA_REGISTERS_96 ", %51, %52, %53, %54, %55, %56, %57, %58"
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_112 ", %59, %60, %61, %62, %63, %64, %65, %66"
#define WGMMA_REGISTERS_144 WGMMA_REGISTERS_128 ", %67, %68, %69, %70, %71, %72, %73, %74"
#define WGMMA_REGISTERS_160 WGMMA_REGISTERS_144 ", %75, %76, %77, %78, %79, %80, %81, %82"
#define WGMMA_REGISTERS_176 WGMMA_REGISTERS_160 ", %83, %84, %85, %86, %87, %88, %89, %90"
#define WGMMA_REGISTERS_192 WGMMA_REGISTERS_176 ", %91, %92, %93, %94, %95, %96, %97, %98"
#define WGMMA_REGISTERS_208 WGMMA_REGISTERS_192 ", %99, %100, %101, %102, %103, %104, %105, %106"
#define WGMMA_REGISTERS_224 WGMMA_REGISTERS_208 ", %107, %108, %109, %110, %111, %112, %113, %114"
#define WGMMA_REGISTERS_240 WGMMA_REGISTERS_224 ", %115, %116, %117, %118, %119, %120, %121, %122"
#define WGMMA_REGISTERS_256 WGMMA_REGISTERS_240 ", %123, %124, %125, %126, %127, %128, %129, %130"
#define WGMMA_OPERANDS_16(d) WGMMA_EIGHT(d, 0)
#define WGMMA_OPERANDS_32(d) WGMMA_OPERANDS_16(d), WGMMA_EIGHT(d, 8)
#define WGMMA_OPERANDS_48(d) WGMMA_OPERANDS_32(d), WGMMA_EIGHT(d, 16)
#define WGMMA_OPERANDS_64(d) WGMMA_OPERANDS_48(d), WGMMA_EIGHT(d, 24)
#define WGMMA_OPERANDS_80(d) WGMMA_OPERANDS_64(d), WGMMA_EIGHT(d, 32)
#define WGMMA_OPERANDS_96(d) WGMMA_OPERANDS_80(d), WGMMA_EIGHT(d, 40)
#define WGMMA_OPERANDS_112(d) WGMMA_OPERANDS_96(d), WGMMA_EIGHT(d, 48)
#define WGMMA_OPERANDS_128(d) WGMMA_OPERANDS_112(d), WGMMA_EIGHT(d, 56)
#define WGMMA_OPERANDS_144(d) WGMMA_OPERANDS_128(d), WGMMA_EIGHT(d, 64)
#define WGMMA_OPERANDS_160(d) WGMMA_OPERANDS_144(d), WGMMA_EIGHT(d, 72)
#define WGMMA_OPERANDS_176(d) WGMMA_OPERANDS_160(d), WGMMA_EIGHT(d, 80)
#define WGMMA_OPERANDS_192(d) WGMMA_OPERANDS_176(d), WGMMA_EIGHT(d, 88)
#define WGMMA_OPERANDS_208(d) WGMMA_OPERANDS_192(d), WGMMA_EIGHT(d, 96)
#define WGMMA_OPERANDS_224(d) WGMMA_OPERANDS_208(d), WGMMA_EIGHT(d, 104)
#define WGMMA_OPERANDS_240(d) WGMMA_OPERANDS_224(d), WGMMA_EIGHT(d, 112)
#define WGMMA_OPERANDS_256(d) WGMMA_OPERANDS_240(d), WGMMA_EIGHT(d, 120)
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
