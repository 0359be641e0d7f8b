/*
gemm_small: out = x W^T for a handful of rows of x, with what surrounds such a product in a decoder.

x [num_rows][K], W [N][K], out [num_rows][N], bf16, float accumulators; num_rows <= 8 * N_TILES.
Optional, by arguments:
    normed       the product of x / rms(x): the float sum is scaled (a norm's weight is part of W)
    bias         added to the scaled float sum before it is rounded
    residual     out = round(product) + residual, rounded; may be out itself
    gated        W is gate rows, then up rows; out [num_rows][N / 2] = silu(gate) * up, rounded as in
                 silu_mul.cu

The time of such a product is that of reading W, so everything serves one stream of loads:
- m16n8k16 with 16 rows of W as A and 8 rows of x as B. A lane's 16-byte chunk of a W row serves two
  MMAs: which k goes to which slot of the MMA is free as long as A and B agree, so lane 4g+t takes
  8 neighbours of row g, and W needs no layout of its own.
- Each lane copies (cp.async) what it will itself read into a ring of shared memory: no barrier in
  the loop. Warps take turns over K in steps of 64, so 128 bytes of a row are read together.
- W is never written, so the ring fills before griddepcontrol.wait, while the kernels before still
  run. The next kernel may start as soon as a warp of each block has nothing left to copy (`early`):
  unlike others this one may launch dependents before its own wait. What follows it must therefore
  read nothing before its wait but weights, and what was there before the step's first product.
- A block owns 16 * ROW_TILES rows of W, and a cluster of CLUSTER blocks splits K; sums go warp by
  warp and block by block in a fixed order, so equal inputs give equal bits. A row's bits do not
  depend on the other rows, nor on ROW_TILES or N_TILES; only on how K is split.
- With more tiles than clusters the ring runs on from one tile into the next, and the sums of a
  tile are sent (cluster.cuh) while the next one is computed: no block waits for its peers.

In a tile, row slots g and g + 8 of the MMA are rows 2g and 2g + 1 of W (so that a lane owns a pair
of neighbours of out), or a gate row and its up row (so that a lane owns both).

Launch: grid CLUSTER * (clusters), block 32 * warps, dynamic shared memory as cuda_gemm.py's
_launch_shape has it; warps >= ROW_TILES * N_TILES, with N_TILES 4 and a cluster a part of that. K a
multiple of 64 and at least CLUSTER * 64; N a multiple of 8, of 16 if gated; N * K below 2^32.
-D ROW_TILES (1, 2), N_TILES (1, 2, 4), CLUSTER (1, 2, 4, 8; before sm_90 only 1).
Programmatic dependent launch is allowed.
*/
#include "cluster.cuh"  // defines: cluster_*, peer_address, send_to_peer
#include "common.cuh"   // defines: bf16, mma_bf16, quad_sum, cp_async_*, mbarrier_*, silu, pdl_*

constexpr int STEP_K = 64;
constexpr int STEP_BYTES = ROW_TILES * 16 * STEP_K * 2;  // of W, a warp and step
constexpr int QUADS = ROW_TILES * N_TILES * 32;          // float4 sums of a tile: one lane's D
constexpr int ROWS = N_TILES * 8;                        // slots for rows of x
constexpr int MAX_WARPS = 8;
// Hopper: bounds by which there are no spills and blocks of the next kernel fit beside.
constexpr int MAX_THREADS = 32 * MAX_WARPS;
constexpr int MIN_BLOCKS = __CUDA_ARCH__ == 900 && N_TILES < 4 ? 2 : 1;

struct Arguments {
    bf16* out;
    const bf16* x;
    const bf16* weight;
    const bf16* bias;
    const bf16* residual;
    int num_rows, n, k, normed, gated, stages, early;
    float eps;
};

__device__ __forceinline__ void copy_weight(uint32_t shared, const bf16* global) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global)
                 : "memory");
}

// At most `pending` groups of copies outstanding; the count is the same for a whole launch.
__device__ __forceinline__ void wait_copies(int pending) {
    switch (pending) {
        case 0: cp_async_wait<0>(); break;
        case 1: cp_async_wait<1>(); break;
        case 2: cp_async_wait<2>(); break;
        case 3: cp_async_wait<3>(); break;
        case 4: cp_async_wait<4>(); break;
        case 5: cp_async_wait<5>(); break;
        case 6: cp_async_wait<6>(); break;
        default: cp_async_wait<7>(); break;
    }
}

__device__ __forceinline__ float4 add4(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// What one lane copies: row slots g and g + 8 of every 16-row tile of a block's tile.
struct Rows {
    uint32_t first[ROW_TILES];  // in elements of W
    uint32_t to_second;

    __device__ __forceinline__ void set(const Arguments& a, int tile, int offset) {
        const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
        for (int r = 0; r < ROW_TILES; r++) {
            const int tile16 = tile * ROW_TILES + r;
            // Rows past the end are read from the last ones, and their sums dropped.
            const int row = a.gated ? min(tile16 * 8 + g, a.n / 2 - 1)
                                    : min(tile16 * 16 + 2 * g, a.n - 2);
            first[r] = (uint32_t)row * a.k + offset;
        }
        to_second = a.gated ? (uint32_t)(a.n / 2) * a.k : a.k;
    }
};

__device__ __forceinline__ void run(const Arguments& a) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const int g = lane >> 2, t = lane & 3;
    const int num_warps = blockDim.x >> 5;
    const int rank = blockIdx.x % CLUSTER;
    const int num_clusters = gridDim.x / CLUSTER, first_tile = blockIdx.x / CLUSTER;
    const int num_tiles = ceil_div(ceil_div(a.n, 16), ROW_TILES);

    // This block's steps of K, and this warp's: warp, warp + num_warps, ...
    const int total_steps = a.k / STEP_K;
    const int first_step = rank * total_steps / CLUSTER;
    const int num_steps = (rank + 1) * total_steps / CLUSTER - first_step;
    const int slice_steps = ceil_div(total_steps, CLUSTER);  // the most that a block has
    const int my_steps = num_steps > warp ? (num_steps - warp - 1) / num_warps + 1 : 0;

    // Shared memory. One tile a block: the partial sums of a warp take the place of its ring.
    const bool single = num_tiles <= num_clusters;
    const int ring_bytes = a.stages * STEP_BYTES;
    uint8_t* const ring = shared + warp * ring_bytes;
    uint8_t* const x_rows = shared + num_warps * ring_bytes;  // [step][half][row][t] 16 bytes
    uint8_t* const cluster_sums = x_rows + a.num_rows * slice_steps * (STEP_K * 2);
#if CLUSTER > 1
    const uint32_t received = shared_address(cluster_sums) + 2 * QUADS * 16;  // an mbarrier a buffer
#endif
    float* const block_squares =  // of x: [warp][row], then [rank][row]
        (float*)(cluster_sums + (CLUSTER > 1 ? 2 * QUADS * 16 + 16 : 0));
    float* const rank_squares = block_squares + MAX_WARPS * ROWS;
    uint8_t* const partials =
        single ? shared : (uint8_t*)block_squares + (a.normed ? (MAX_WARPS + 8) * ROWS * 4 : 0);
    const int partial_stride = single ? ring_bytes : QUADS * 16;  // of a warp
    const int buffer_stride = single ? 0 : num_warps * QUADS * 16;

#if CLUSTER > 1
    // A buffer's phase: the sums of all ranks for one tile; with the first, squares of x.
    constexpr int SUM_BYTES = QUADS * 16;
    if (threadIdx.x == 0) {
        mbarrier_init(received, 1);
        mbarrier_init(received + 8, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(received, SUM_BYTES + (a.normed ? CLUSTER * ROWS * 4 : 0));
        mbarrier_arrive_expect(received + 8, SUM_BYTES);
    }
#endif

    // Before the wait: nothing but weights.
    const int lane_offset = (first_step + warp) * STEP_K + t * 8;
    Rows rows;
    rows.set(a, first_tile, lane_offset);
    int copy_tile = first_tile, copy_step = 0, copy_stage = 0;
    auto copy_next = [&]() {
        if (copy_tile < num_tiles && my_steps > 0) {
            const uint32_t to = shared_address(ring) + copy_stage * STEP_BYTES + lane * 16;
            const uint32_t offset = copy_step * num_warps * STEP_K;
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++) {
                const bf16* from = a.weight + (rows.first[r] + offset);
                copy_weight(to + (r * 4 + 0) * 512, from);
                copy_weight(to + (r * 4 + 1) * 512, from + 32);
                copy_weight(to + (r * 4 + 2) * 512, from + rows.to_second);
                copy_weight(to + (r * 4 + 3) * 512, from + rows.to_second + 32);
            }
            if (++copy_step == my_steps) {
                copy_step = 0;
                copy_tile += num_clusters;
                rows.set(a, copy_tile, lane_offset);
                if (a.early && copy_tile >= num_tiles) pdl_launch_dependents();
            }
            if (++copy_stage == a.stages) copy_stage = 0;
        }
        cp_async_commit();
    };
#pragma unroll 1
    for (int i = 0; i < a.stages; i++) copy_next();
#if CLUSTER > 1
    cluster_arrive_relaxed();  // waited for before anything is sent
#endif
    pdl_wait();
    if (!a.early) pdl_launch_dependents();

    // x, as this lane will need it: rows g, g + 8, ... of its own chunks.
    auto x_slot = [&](int step, int half, int row) {
        return (uint4*)(x_rows + ((((step * num_warps + warp) * 2 + half) * a.num_rows + row) * 4 + t) * 16);
    };
#pragma unroll 1
    for (int step = 0; step < my_steps; step++)
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int j = 0; j < N_TILES; j++)
                if (g + 8 * j < a.num_rows)
                    cp_async_16(
                        shared_address(x_slot(step, half, g + 8 * j)),
                        a.x + (int64_t)(g + 8 * j) * a.k + lane_offset +
                            step * num_warps * STEP_K + half * 32);
    cp_async_commit();

    // The sum that this thread finishes: its place in out, and the old value there.
    constexpr int SHARE = QUADS / CLUSTER;
    const int quad = rank * SHARE + threadIdx.x;
    const int row = quad / 32 % N_TILES * 8 + 2 * (quad & 3);
    const int width = a.gated ? a.n / 2 : a.n;
    uint32_t old[2] = {0, 0};
    uint32_t bias = 0;
    int column;
    bool mine;
    auto begin_tile = [&](int tile) {
        const int tile16 = tile * ROW_TILES + quad / (32 * N_TILES);
        column = a.gated ? tile16 * 8 + (quad >> 2 & 7) : tile16 * 16 + 2 * (quad >> 2 & 7);
        mine = (int)threadIdx.x < SHARE && column < width && row < a.num_rows;
        if (mine && a.residual) {
            const bf16* from = a.residual + (int64_t)row * width + column;
            old[0] = *(const volatile uint32_t*)from;
            if (row + 1 < a.num_rows) old[1] = *(const volatile uint32_t*)(from + width);
        }
        if (mine && a.bias) bias = *(const uint32_t*)(a.bias + column);
    };
    begin_tile(first_tile);
    cp_async_wait<0>();
#if CLUSTER > 1
    cluster_wait();
#endif

    const auto squares_of_warps = [&](int row) {
        float sum = 0.0f;
        for (int w = 0; w < num_warps; w++) sum += block_squares[w * ROWS + row];
        return sum;
    };
    // Round, with what surrounds the product, and store the sum of the tile that was begun.
    auto finish_tile = [&](float4 sum) {
        float products[2][2] = {{sum.x, sum.z}, {sum.y, sum.w}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!mine || row + i >= a.num_rows) break;
            bf16* const to = a.out + (int64_t)(row + i) * width + column;
            if (a.normed) {
                float squares = 0.0f;
                if (CLUSTER == 1) squares = squares_of_warps(row + i);
                else
#pragma unroll
                    for (int peer = 0; peer < CLUSTER; peer++)
                        squares += rank_squares[peer * ROWS + row + i];
                const float scale = rsqrtf(squares / a.k + a.eps);
                products[i][0] *= scale, products[i][1] *= scale;
            }
            if (a.gated) {
                const float gate = round_bf16(products[i][0]), up = round_bf16(products[i][1]);
                *to = float_to_bf16(round_bf16(silu(gate)) * up);
                continue;
            }
            uint32_t pair = pack_bf16(products[i][0] + bf16_low(bias), products[i][1] + bf16_high(bias));
            if (a.residual)
                pair = pack_bf16(bf16_low(pair) + bf16_low(old[i]), bf16_high(pair) + bf16_high(old[i]));
            *(uint32_t*)to = pair;
        }
    };

    // Blocks of a cluster finish a tile only when they have summed up the next one, so that none
    // waits for its peers; hence one turn more.
    const int end_tile = num_tiles + (CLUSTER > 1 ? num_clusters : 0);
    int stage = 0, buffer = 0;
#if CLUSTER > 1
    int parity = 0;  // of both buffers' phases
    // The tile before is complete when all ranks' sums for it have come.
    auto finish_before = [&](int tile) {
        if (threadIdx.x < SHARE) {
            const uint32_t barrier = received + 8 * (buffer ^ 1);
            mbarrier_wait(barrier, parity);
            const float4* const ready = (float4*)cluster_sums + (buffer ^ 1) * QUADS;
            float4 whole = ready[threadIdx.x];
            for (int peer = 1; peer < CLUSTER; peer++)
                whole = add4(whole, ready[peer * SHARE + threadIdx.x]);
            if (threadIdx.x == 0) mbarrier_arrive_expect(barrier, SUM_BYTES);
            finish_tile(whole);
        }
        if (buffer == 0) parity ^= 1;
        begin_tile(tile);
    };
#endif
    for (int tile = first_tile; tile < end_tile; tile += num_clusters, buffer ^= 1) {
        const bool is_last_turn = CLUSTER > 1 && tile >= num_tiles;
        const bool add_squares = a.normed && tile == first_tile;
        uint8_t* const sums_of_tile = partials + buffer * buffer_stride;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (!is_last_turn) {
            float squares[N_TILES] = {};
            float d[ROW_TILES][N_TILES][4];
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int j = 0; j < N_TILES; j++)
#pragma unroll
                    for (int i = 0; i < 4; i++) d[r][j][i] = 0.0f;
#pragma unroll 1
            for (int step = 0; step < my_steps; step++) {
                uint4 b[2][N_TILES];
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int j = 0; j < N_TILES; j++) {
                        b[half][j] = make_uint4(0, 0, 0, 0);
                        if (g + 8 * j < a.num_rows) b[half][j] = *x_slot(step, half, g + 8 * j);
                    }
                if (add_squares)
#pragma unroll
                    for (int j = 0; j < N_TILES; j++)
                        squares[j] += squares_of(b[0][j]) + squares_of(b[1][j]);
                wait_copies(a.stages - 1);
                const uint4* w = (const uint4*)(ring + stage * STEP_BYTES) + lane;
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const uint4 top = w[(r * 4 + half) * 32], bottom = w[(r * 4 + 2 + half) * 32];
                        const uint32_t low[4] = {top.x, bottom.x, top.y, bottom.y};
                        const uint32_t high[4] = {top.z, bottom.z, top.w, bottom.w};
#pragma unroll
                        for (int j = 0; j < N_TILES; j++) {
                            mma_bf16(d[r][j], low, b[half][j].x, b[half][j].y);
                            mma_bf16(d[r][j], high, b[half][j].z, b[half][j].w);
                        }
                    }
                copy_next();
                if (++stage == a.stages) stage = 0;
            }

            // Over the warps.
            float4* const my_partial = (float4*)(sums_of_tile + warp * partial_stride) + lane;
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int j = 0; j < N_TILES; j++)
                    my_partial[(r * N_TILES + j) * 32] =
                        make_float4(d[r][j][0], d[r][j][1], d[r][j][2], d[r][j][3]);
            if (add_squares)
#pragma unroll
                for (int j = 0; j < N_TILES; j++) {
                    squares[j] = quad_sum(squares[j]);
                    if (t == 0) block_squares[warp * ROWS + j * 8 + g] = squares[j];
                }
#if CLUSTER > 1
            // Here, so that all have read its slots before any thread sends sums of this tile: peers
            // wait for those before they fill the slots again.
            if (tile != first_tile) finish_before(tile);
#endif
            __syncthreads();
            if (threadIdx.x < QUADS)
#pragma unroll 4
                for (int w = 0; w < num_warps; w++)
                    sum = add4(
                        sum, *((const float4*)(sums_of_tile + w * partial_stride) + threadIdx.x));
        }

#if CLUSTER == 1
        finish_tile(sum);
        begin_tile(tile + num_clusters);
#else
        if (is_last_turn) {
            finish_before(tile);
            break;
        }
        // Over the cluster: each rank finishes SHARE sums of a tile.
        float4* const slots = (float4*)cluster_sums + buffer * QUADS;  // [rank][SHARE]
        const uint32_t barrier = received + 8 * buffer;
        auto send_sum = [&](int i, float4 value) {
            const int to = i / SHARE;
            send_to_peer(peer_address(shared_address(slots + rank * SHARE + i % SHARE), to), value,
                peer_address(barrier, to));
        };
        if (threadIdx.x < QUADS) send_sum(threadIdx.x, sum);
#if N_TILES == 4  // a block of few warps has threads with two sums
        for (int i = threadIdx.x + blockDim.x; i < QUADS; i += blockDim.x) {
            sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            for (int w = 0; w < num_warps; w++)
                sum = add4(sum, *((const float4*)(sums_of_tile + w * partial_stride) + i));
            send_sum(i, sum);
        }
#endif
        if (add_squares)
            for (int i = threadIdx.x; i < CLUSTER * ROWS; i += blockDim.x)
                send_to_peer(
                    peer_address(shared_address(rank_squares + rank * ROWS + i % ROWS), i / ROWS),
                    squares_of_warps(i % ROWS), peer_address(barrier, i / ROWS));
#endif
    }
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(MAX_THREADS, MIN_BLOCKS) gemm_small(
    bf16* out, const bf16* x, const bf16* weight, const bf16* bias, const bf16* residual,
    int num_rows, int n, int k, int normed, int gated, int stages, int early, float eps) {
    run({out, x, weight, bias, residual, num_rows, n, k, normed, gated, stages, early, eps});
}
