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
- Behind the wait stands what needs x, and little else: addresses are known by then, W of a warp's
  first step goes to registers while x is under way, and where the ring holds all of W the loop does
  nothing but multiply. For 1 / rms the tensor cores take squares too: the diagonal of x x^T.
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
#include "cluster.cuh"     // defines: cluster_*, peer_address, send_to_peer
#include "common.cuh"      // defines: bf16, cp_async_*, mbarrier_*, silu, pdl_*
#include "small_tile.cuh"  // defines: sizes, Arguments, Rows, copy_weight, wait_copies, multiply, ...

// Hopper: bounds by which there are no spills and blocks of the next kernel fit beside.
constexpr int MAX_THREADS = 32 * MAX_WARPS;
constexpr int MIN_BLOCKS = __CUDA_ARCH__ == 900 && N_TILES < 4 ? 2 : 1;

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
    const int x_rows = num_warps * ring_bytes;  // [step][half][row][t] 16 bytes
    uint8_t* const cluster_sums = shared + x_rows + a.num_rows * slice_steps * (STEP_K * 2);
#if CLUSTER > 1
    const uint32_t received = shared_address(cluster_sums) + 2 * QUADS * 16;  // an mbarrier a buffer
#endif
    int squares_at =  // of x: [row][warp], then [row][rank]
        cluster_sums - shared + (CLUSTER > 1 ? 2 * QUADS * 16 + 16 : 0);
    const int partials = single ? 0 : squares_at + (a.normed ? (MAX_WARPS + 8) * ROWS * 4 : 0);
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
    cluster_arrive_relaxed();
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
    // Where the ring holds all that there is to copy, the loop over K neither waits nor copies.
    const bool refills = copy_tile < num_tiles && my_steps > 0;

    // The warp's 16-byte chunks of x, 8 * 4 at a time, however many rows: a lane's next one.
    int x_half_bytes = a.num_rows * 64, x_step_bytes = num_warps * 2 * x_half_bytes;
    const int my_x = x_rows + warp * 2 * x_half_bytes + t * 16;
    const int num_x = 2 * my_steps * a.num_rows;
    const int halves_of_8 = 8 / a.num_rows, rows_of_8 = 8 - halves_of_8 * a.num_rows;
    int x_half = g / a.num_rows, x_row = g - x_half * a.num_rows;  // x_half: 2 * step + half
    int x_to, x_from;
    auto place_x = [&]() {
        x_to = my_x + (x_half >> 1) * x_step_bytes + (x_half & 1) * x_half_bytes + x_row * 64;
        x_from = x_row * a.k + lane_offset +
                 ((x_half >> 1) * num_warps * 2 + (x_half & 1)) * (STEP_K / 2);
    };
    place_x();
    // Rows g, g + 8, ...; for those that there are not another, whose sums are dropped.
    int b_offset[N_TILES];
#pragma unroll
    for (int j = 0; j < N_TILES; j++) b_offset[j] = min(g + 8 * j, a.num_rows - 1) * 64;
    int partial_at = partials + warp * partial_stride + lane * 16;
    int w_at = warp * ring_bytes + lane * 16, x_at = my_x + b_offset[0];
    int tile = first_tile;
    int sum_at = partials + threadIdx.x * 16;

    // The sum that this thread finishes: its place in out, and the old value there.
    constexpr int SHARE = QUADS / CLUSTER;
    const int quad = rank * SHARE + threadIdx.x;
    const int row = quad / 32 % N_TILES * 8 + 2 * (quad & 3);
    const int width = a.gated ? a.n / 2 : a.n;
    uint32_t old[2] = {0, 0};
    uint32_t bias = 0;
    bf16* to;  // in out
    int place;
    bool mine;
    auto place_tile = [&](int tile) {
        const int tile16 = tile * ROW_TILES + quad / (32 * N_TILES);
        const int column =
            a.gated ? tile16 * 8 + (quad >> 2 & 7) : tile16 * 16 + 2 * (quad >> 2 & 7);
        place = row * width + column;
        to = a.out + (uint32_t)place;
        mine = (int)threadIdx.x < SHARE && column < width && row < a.num_rows;
        if (mine && a.bias) bias = *(const uint32_t*)(a.bias + column);
    };
    auto read_old = [&]() {
        if (!mine || !a.residual) return;
        const bf16* from = a.residual + (uint32_t)place;
        old[0] = *(const volatile uint32_t*)from;
        if (row + 1 < a.num_rows) old[1] = *(const volatile uint32_t*)(from + width);
    };
    place_tile(first_tile);
    const float inverse_k = 1.0f / a.k;
    if (a.normed)  // of warps that there are not
        for (int i = threadIdx.x; i < ROWS * MAX_WARPS; i += blockDim.x)
            if (i % MAX_WARPS >= num_warps) ((float*)(shared + squares_at))[i] = 0.0f;
#if CLUSTER > 1
    cluster_wait();  // for their mbarriers, before anything is sent
#endif

    keep(x_to), keep(x_from), keep(x_at), keep(x_half_bytes), keep(x_step_bytes);
    keep(w_at), keep(partial_at), keep(sum_at), keep(squares_at), keep(place), keep(to), keep(tile);
    pdl_wait();
    if (!a.early) pdl_launch_dependents();
#pragma unroll 1
    for (int i = g; i < num_x; i += 8) {
        cp_async_16(shared_address(shared + x_to), a.x + (uint32_t)x_from);
        x_half += halves_of_8;
        x_row += rows_of_8;
        if (x_row >= a.num_rows) x_row -= a.num_rows, x_half++;
        place_x();
    }
    cp_async_commit();
    read_old();

    const auto sum_of_warps = [&](const uint8_t* from) {
        float4 sum = *(const float4*)from, parts[MAX_WARPS - 1];
#pragma unroll
        for (int i = 0; i < MAX_WARPS - 1; i++) {
            from += partial_stride;
            parts[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (i + 1 < num_warps) parts[i] = *(const float4*)from;
        }
#pragma unroll
        for (int i = 0; i < MAX_WARPS - 1; i++) sum = add4(sum, parts[i]);
        return sum;
    };
    float* const warp_squares = (float*)(shared + squares_at);
    float* const rank_squares = warp_squares + ROWS * MAX_WARPS;
    const auto squares_of_warps = [&](int row) { return sum_of<MAX_WARPS>(warp_squares, row); };
    // Round, with what surrounds the product, and store the sum of the tile that was begun.
    auto finish_tile = [&](float4 sum) {
        float products[2][2] = {{sum.x, sum.z}, {sum.y, sum.w}};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (!mine || row + i >= a.num_rows) break;
            if (a.normed) {
                const float squares = CLUSTER == 1 ? squares_of_warps(row + i)
                                                   : sum_of<CLUSTER>(rank_squares, row + i);
                const float scale = rsqrtf(squares * inverse_k + a.eps);
                products[i][0] *= scale, products[i][1] *= scale;
            }
            if (a.gated) {
                const float gate = round_bf16(products[i][0]), up = round_bf16(products[i][1]);
                store_global(to + i * width, float_to_bf16(round_bf16(silu(gate)) * up));
                continue;
            }
            uint32_t pair = pack_bf16(products[i][0] + bf16_low(bias), products[i][1] + bf16_high(bias));
            if (a.residual)
                pair = pack_bf16(bf16_low(pair) + bf16_low(old[i]), bf16_high(pair) + bf16_high(old[i]));
            store_global(to + i * width, pair);
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
        place_tile(tile);
        read_old();
    };
#endif
    bool is_first = true, has_x = false;
    for (; tile < end_tile; tile += num_clusters, buffer ^= 1, is_first = false) {
        const bool add_squares = a.normed && is_first;
        const bool is_last_turn = CLUSTER > 1 && tile >= num_tiles;
        uint8_t* const sums_of_tile = shared + buffer * buffer_stride;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (!is_last_turn) {
            float d[ROW_TILES][N_TILES][4] = {};
            float squares[N_TILES][4] = {};  // of rows: the diagonal of x x^T
            const uint8_t* x_step = shared + x_at;
#pragma unroll 1
            for (int step = 0; step < my_steps; step++, x_step += x_step_bytes) {
                // W of the first step goes to registers while x is under way.
                if (!has_x) cp_async_wait<1>();
                else if (refills) wait_copies(a.stages - 1);
                const uint4* const from = (const uint4*)(shared + w_at + stage * STEP_BYTES);
                uint4 w[ROW_TILES][4];  // row slots g, then g + 8, of two halves each
#pragma unroll
                for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) w[r][i] = from[(r * 4 + i) * 32];
                if (!has_x) {
                    cp_async_wait<0>();
                    __syncwarp();  // x came by other lanes, too
                    has_x = true;
                }
                uint4 b[2][N_TILES];
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int j = 0; j < N_TILES; j++)
                        b[half][j] = *(const uint4*)(x_step + half * x_half_bytes +
                                                     (b_offset[j] - b_offset[0]));
#pragma unroll
                for (int half = 0; half < 2; half++)
#pragma unroll
                    for (int j = 0; j < N_TILES; j++) {
#pragma unroll
                        for (int r = 0; r < ROW_TILES; r++)
                            multiply(d[r][j], w[r][half], w[r][2 + half], b[half][j]);
                        if (add_squares) multiply(squares[j], b[half][j], b[half][j], b[half][j]);
                    }
                if (refills) copy_next();
                if (++stage == a.stages) stage = 0;
            }

            // Over the warps.
            float4* const my_partial = (float4*)(sums_of_tile + partial_at);
#pragma unroll
            for (int r = 0; r < ROW_TILES; r++)
#pragma unroll
                for (int j = 0; j < N_TILES; j++)
                    my_partial[(r * N_TILES + j) * 32] =
                        make_float4(d[r][j][0], d[r][j][1], d[r][j][2], d[r][j][3]);
            if (add_squares)
#pragma unroll
                for (int j = 0; j < N_TILES; j++)
                    if (t == g >> 1)
                        warp_squares[(j * 8 + g) * MAX_WARPS + warp] =
                            g & 1 ? squares[j][1] : squares[j][0];
#if CLUSTER > 1
            // Here, so that all have read its slots before any thread sends sums of this tile: peers
            // wait for those before they fill the slots again.
            if (!is_first) finish_before(tile);
#endif
            __syncthreads();
            if (threadIdx.x < QUADS) sum = sum_of_warps(sums_of_tile + sum_at);
        }

#if CLUSTER == 1
        finish_tile(sum);
        place_tile(tile + num_clusters);
        read_old();
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
        for (int i = threadIdx.x + blockDim.x; i < QUADS; i += blockDim.x)
            send_sum(i, sum_of_warps(sums_of_tile + partials + i * 16));
#endif
        if (add_squares)  // the last warps have no sums to send, where there are few
            for (int i = blockDim.x - 1 - threadIdx.x; i < CLUSTER * ROWS; i += blockDim.x)
                send_to_peer(
                    peer_address(
                        shared_address(rank_squares + i % ROWS * CLUSTER + rank), i / ROWS),
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
