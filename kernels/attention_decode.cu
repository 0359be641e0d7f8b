/*
attention_decode: attention of one new token a sequence over its pages, in one launch for any batch,
from the product with W_qkv on: it also finishes the token's query, key and value and stores the latter
two (decode_new.cuh).

Memory-bound: every K and V byte is read once, and all else hides behind that stream.
- Work split on the device, no host plan: the tiles of 64 tokens of all (sequence, kv head) pairs
  form one line, and the blocks of a fixed grid take stretches of it that take equally long
  ("stream-K"). A block works through segments: its part of one pair. Where a pair is cut, the other
  blocks leave partial results (max, sum, O in float32) in the workspace, and the one with the pair's
  beginning merges them in order of position (decode_merge.cuh), so repeated runs give equal bits.
- Few pairs (`may_be_even`) are cut by themselves instead, each for the blocks of a cluster, which
  send their results from shared memory to shared memory (decode_plan.cuh says when).
- Swapped operands: S^T = K Q^T and O^T = V^T P^T with mma.m16n8k16, so 16 tokens fill the rows and
  the query heads of one kv head the 8 columns (HEAD_TILES of 8). No row is padding.
- Four consumer warps take 16 tokens of a tile each, with their own running max, sum and O, merged
  once a segment. On sm_90 and newer two further warps fill a ring of STAGES (decode_feed.cuh); on
  older chips each warp streams its own 16 rows by cp.async.
- Keys past the end are masked, and values there are cleared in registers: a page may hold anything
  beyond its sequence, even NaN.

Launch: grid of any size that CLUSTER divides (partials has room for it; num_sms * blocks an SM is
best), block THREADS, dynamic shared memory STAGES * STAGE_BYTES and for each of CLUSTER - 1 parts
group * (HEAD_DIM + 2) floats (backend/cuda_attention.py computes them). -D HEAD_DIM (64, 128),
HEAD_TILES (1 for groups up to 8, 2 up to 16), CLUSTER (1; 2, 4, 8 where LARGE_SHARED, with HEAD_TILES
1 and RING); may_be_even: num_seqs * num_kv_heads * CLUSTER <= grid. May be launched with PDL, after the kernel
that writes qkv: before its wait it reads what was there before the step's first product, namely
context_lens, seq_slots, the page table and the keys and values of earlier steps, so all tiles. With
`beside_prefill` the kernel before is prefill attention of the same step, which lets this one start after
its own wait: so qkv and all before it is complete, nothing waits until the end, and the blocks stream
while those of the prefill compute. Blocks from num_early on, for which there is room only then, get
`delay` tiles less to do (no late blocks: num_early is the grid, delay 0).
qkv [num_seqs][num_kv_heads * (group + 2)][HEAD_DIM], out [num_seqs][num_kv_heads * group][HEAD_DIM];
sequence i is row i of qkv, context_lens (the new token included) and seq_slots; page_table [..,
table_stride], row seq_slots[i]. A sequence of length 0 gets zeros.
partials: float [2 * grid, 8 * HEAD_TILES, HEAD_DIM + 2], all bits set before the first launch, and left
so by each.
*/
#include "common.cuh"        // defines: bf16, mbarriers, bulk_copy, cp_async, kv_block_offset
#include "decode_plan.cuh"   // defines: TILE, Cut, Cuts, Walk, plan
#include "decode_tile.cuh"   // defines: sizes, Shared, Accumulator, load_query, attend
#include "decode_new.cuh"    // defines: NewTokens, QueryParts, finish_query, row_scale
#include "decode_feed.cuh"   // defines: Pages, produce, make_new, WarpLoads
#include "decode_merge.cuh"  // defines: Partials, finish_heads

// ---------------------------------------------------------------------------------------------

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, BLOCKS_PER_SM) attention_decode(
    const bf16* __restrict__ qkv, uint8_t* kv, bf16* __restrict__ out,
    const int* __restrict__ context_lens, const int* __restrict__ seq_slots,
    const int* __restrict__ page_table, float* partials_base, const bf16* __restrict__ q_norm,
    const bf16* __restrict__ k_norm, const float* __restrict__ rope_table,
    const bf16* __restrict__ norm_rows, const bf16* __restrict__ bias, int num_seqs,
    int num_kv_heads, int group, int table_stride, int page_shift, int hidden, float scale,
    float eps, float rows_eps, int beside_prefill, int may_be_even, int num_early, int delay) {
    extern __shared__ __align__(1024) uint8_t stages_memory[];
    __shared__ Shared shared;
    uint32_t stages = shared_address(stages_memory);
    int warp = threadIdx.x / 32;

#if HAS_BULK_COPY
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(shared_address(&shared.full[i]), 1 + 32);  // produce, make_new
            mbarrier_init(shared_address(&shared.empty[i]), WARPS);
        }
#if CLUSTER > 1
        mbarrier_init(shared_address(&shared.received), 1);
#endif
        mbarrier_init_fence();
    }
#endif
    Cuts cuts;
    Walk walk = plan(
        context_lens, seq_slots, num_seqs, num_kv_heads, may_be_even, num_early, delay, cuts);
    int num_q_heads = num_kv_heads * group;
    const Pages pages = {kv, page_table, num_kv_heads, table_stride, page_shift};
    const NewTokens tokens = {
        qkv, q_norm, k_norm, rope_table, norm_rows, bias, num_q_heads, num_kv_heads, hidden, eps,
        rows_eps};
    uint8_t* const behind_stages = stages_memory + STAGES * STAGE_BYTES;
#if CLUSTER > 1
    bool is_first = cuts.even && cuts.first_block == (int)blockIdx.x;
    if (threadIdx.x == 0 && is_first && walk.tiles > 1)
        Received{behind_stages, group, shared}.expect(min(walk.tiles, CLUSTER));
    cluster_arrive_relaxed();
#endif
#if HAS_BULK_COPY
    __syncthreads();  // the barriers are there
    if (warp >= WARPS) {
        if (warp == WARPS)
            produce(walk, pages, stages, shared);
        else
            make_new(walk, pages, stages, shared, tokens, beside_prefill);
#if CLUSTER > 1
        cluster_wait();
#endif
        return;
    }
#endif
    // Where this warp's 16 rows of a tile lie in a stage.
    int rows = pages.rows();
    int offset = warp * 16;
    int half_bytes = rows * 128;
    uint32_t mine = stages + (offset / rows) * rows * TOKEN_BYTES + (offset % rows) * 128;
#if !HAS_BULK_COPY
    WarpLoads loads(walk, pages, mine, offset);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) loads.issue();
#endif
    bool more = walk.next();
    QueryParts parts;
    if (more && PREFETCH_QUERY) parts.load(tokens, walk.length - 1);
#if CLUSTER > 1
    cluster_wait();  // for their barriers, before parts are sent
#endif
    if (!beside_prefill) {
        pdl_wait();
        pdl_launch_dependents();
    }
    const Partials partials = {partials_base};
    int stage = 0, parity = 0, side = 0;
    auto raw_query = [&]() { return tokens.row(walk.seq) + walk.head * group * HEAD_DIM; };
    uint32_t query[HEAD_TILES][K_STEPS][2];
    if (more && PREFETCH_QUERY) load_query(query, raw_query(), group);
    // Rows of padding, while the query travels.
#pragma unroll 1
    for (int seq = blockIdx.x; seq < num_seqs; seq += gridDim.x) {
        if (context_lens[seq] != 0) continue;
        uint4* row = (uint4*)(out + (int64_t)seq * num_q_heads * HEAD_DIM);
#pragma unroll 1
        for (int i = threadIdx.x; i < num_q_heads * HEAD_DIM / 8; i += CONSUMERS)
            row[i] = make_uint4(0, 0, 0, 0);
    }
    float row_scaling = 1.0f;
    while (more) {
        if (!PREFETCH_QUERY) {
            load_query(query, raw_query(), group);
            parts.load(tokens, walk.length - 1);
        }
        // Before the first tile is there: the divisions cost nothing here.
        const Cut cut = cuts.of(walk);
        bf16* to = out + ((int64_t)walk.seq * num_q_heads + walk.head * group) * HEAD_DIM;
#if HAS_BULK_COPY
        if (norm_rows) {
            mbarrier_wait(shared_address(&shared.full[stage]), parity);
            row_scaling = shared.scale[stage];
        }
#else
        int position = walk.length - 1;
        if (norm_rows) row_scaling = row_scale(tokens, walk.seq);
        bool has_new = walk.last_tile == walk.tiles && position % TILE / 16 == warp;
        NewKeyValue fresh;
        if (has_new) {
            fresh.load(tokens, walk.seq, walk.head, position);
            fresh.make(tokens, row_scaling);
            pages.store(fresh, walk);
        }
#endif
        finish_query(query, tokens, parts, walk.head * group, group, row_scaling);
        Accumulator acc;
        acc.clear();
        for (int tile = walk.tile; tile < walk.last_tile; tile++) {
            int valid = walk.length - tile * TILE - offset;
            uint32_t k = mine + stage * STAGE_BYTES;
            uint32_t v = k + HALVES * half_bytes;
#if HAS_BULK_COPY
            mbarrier_wait(shared_address(&shared.full[stage]), parity);
#else
            loads.issue();
            cp_async_wait<STAGES - 1>();
            __syncwarp();
            if (has_new && tile == walk.tiles - 1) fresh.patch(k, v, half_bytes, position % 16);
#endif
            if (valid >= 16)
                attend<false>(acc, query, k, v, half_bytes, valid, scale);
            else if (valid > 0)
                attend<true>(acc, query, k, v, half_bytes, valid, scale);
            __syncwarp();
#if HAS_BULK_COPY
            if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&shared.empty[stage]));
#endif
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }

        // The next segment's query travels while this one is finished.
        more = walk.next();
        if (more && PREFETCH_QUERY) load_query(query, raw_query(), group);

#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
            finish_heads(
                acc, n, min(HEADS, group - n * HEADS), side ^ n, shared, cut, cuts.even,
                behind_stages, to, partials);
        if (HEAD_TILES == 1) side ^= 1;
        if (more && PREFETCH_QUERY) parts.load(tokens, walk.length - 1);
    }
    // Whoever waits for this kernel wants the rows of the one before as well.
    if (beside_prefill) pdl_wait();
}
