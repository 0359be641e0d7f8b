/* One box of a matrix through a tensor map, as it lies in shared memory: for the test beside it.

   One block. The map is a parameter of 128 bytes by value, between others; each 4-byte word of the
   box is written to `out` plus `offset`. */

#include "common.cuh"

struct __align__(64) TensorMap {
    char bytes[128];
};

extern "C" __global__ void __launch_bounds__(128, 1) copy_box(int column,
    const __grid_constant__ TensorMap map, int row, uint32_t* out, int num_bytes, float offset) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ uint64_t barrier;
    const uint32_t at_barrier = shared_address(&barrier);
    if (threadIdx.x == 0) {
        mbarrier_init(at_barrier, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(at_barrier, num_bytes);
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
            "l"(&map), "r"(column), "r"(row), "r"(at_barrier)
            : "memory");
    }
    __syncthreads();
    mbarrier_wait(at_barrier, 0);
    for (int i = threadIdx.x; i < num_bytes / 4; i += blockDim.x)
        out[i] = reinterpret_cast<const uint32_t*>(shared)[i] + static_cast<uint32_t>(offset);
}
