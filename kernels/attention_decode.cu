/*
attention_decode: attention of one new token a sequence over its pages, in one launch for any batch.

Memory-bound: every K and V byte is read once, and all else hides behind that stream.
- Work split on the device, no host plan: the tiles of 64 tokens of all (sequence, kv head) pairs
  form one line, and the blocks of a fixed grid take equal stretches of it ("stream-K"). A block
  works through segments: its part of one pair. Where a pair is cut, each block leaves a partial
  result (max, sum, O in float32) in the workspace and the last one to arrive merges them in order
  of position, so repeated runs give equal bits.
- Swapped operands: S^T = K Q^T and O^T = V^T P^T with mma.m16n8k16, so 16 tokens fill the rows and
  the query heads of one kv head the 8 columns (HEAD_TILES of 8). No row is padding.
- Four consumer warps take 16 tokens of a tile each, with their own running max, sum and O, merged
  once a segment. On sm_90 and newer a fifth warp streams tiles by bulk copies through a ring of
  STAGES; on older chips each warp streams its own 16 rows by cp.async.
- Keys past the end are masked, and values there are cleared in registers: a page may hold anything
  beyond its sequence, even NaN.

Launch: grid any size up to num_sms * blocks an SM (partials has room for it), block THREADS, dynamic
shared memory SHARED_BYTES (backend/cuda_attention.py computes both), -D HEAD_DIM (64, 128),
HEAD_TILES (1 for groups up to 8, 2 up to 16). May be launched with PDL, after a kernel that writes q
and the keys and values of the new tokens: before its wait it reads context_lens, seq_slots, the page
table and all tiles of a sequence but the last, which an earlier kernel or step has finished.
q [num_seqs, num_kv_heads * group, HEAD_DIM], out the same; sequence i is row i of q, context_lens
and seq_slots; page_table [.., table_stride], row seq_slots[i]. A sequence of length 0 gets zeros.
partials: float [2 * grid, 8 * HEAD_TILES, HEAD_DIM + 2]; counters: int32 [num_seqs * num_kv_heads],
zero before the first launch, left zero by each.
*/
#include "common.cuh"  // defines: bf16, ldmatrix, mma_bf16, mbarriers, bulk_copy, cp_async, pdl_*

constexpr int TILE = 64;
constexpr int WARPS = 4;                   // consumers
constexpr int CONSUMERS = WARPS * 32;
constexpr int THREADS = CONSUMERS + (HAS_BULK_COPY ? 32 : 0);
constexpr int HALVES = HEAD_DIM / 64;
constexpr int PIECES = 2 * HALVES;         // (K|V, half) blocks of a page
constexpr int TOKEN_BYTES = HEAD_DIM * 4;  // K and V of one token of one head
constexpr int STAGE_BYTES = TILE * TOKEN_BYTES;
// 96 KB of stages and two blocks an SM where an SM has 228 KB; 64 KB where it has 164 (two) or 100.
constexpr bool LARGE_SHARED = __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200;
constexpr int BLOCKS_PER_SM = LARGE_SHARED || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870 ? 2 : 1;
constexpr int STAGES = (LARGE_SHARED ? 3 : 2) * (128 / HEAD_DIM);
constexpr int HEADS = 8;                   // columns of one mma
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int DIM_TILES = HEAD_DIM / 16;
constexpr bool PREFETCH_QUERY = HEAD_TILES == 1;  // the registers of two tiles leave no room
constexpr int DIM_QUADS = HEAD_DIM / 4;
constexpr int ROWS_AT_ONCE = 32 / DIM_QUADS;  // partial rows that a warp reads with 16 bytes a lane
constexpr int MERGE_LOADS = 8;               // such reads in flight

// 17 KB at HEAD_DIM 128: what is left beside the stages for two blocks an SM.
struct Shared {
    union {
        float o[WARPS][HEAD_DIM][HEADS];  // the warps' O at the end of a segment
        float merged[WARPS][HEAD_DIM];    // their shares of a merge
    };
    float max[2][WARPS][HEADS], sum[WARPS][HEADS];  // max: alternately, so one barrier less is due
    float merged_max[WARPS];
    uint64_t full[STAGES], empty[STAGES];
    int is_last;
};

// The line of tiles cut into equal stretches: block p has tiles start(p) .. start(p + 1) - 1.
struct Stretches {
    int quotient, remainder;

    __device__ Stretches(int total, int num_blocks)
        : quotient(total / num_blocks), remainder(total % num_blocks) {}
    __device__ int start(int block) const { return block * quotient + min(block, remainder); }
    __device__ int owner(int tile) const {
        int longer = remainder * (quotient + 1);
        return tile < longer ? tile / (quotient + 1) : remainder + (tile - longer) / quotient;
    }
};

// Walks a block's stretch of the line, segment by segment.
struct Walk {
    const int* context_lens;
    const int* seq_slots;
    int position, end;             // on the line
    int num_kv_heads;
    int seq, length, tiles, before;  // current sequence; tiles of all earlier sequences (one head)
    int slot;                        // its row of the page table
    int head, tile, last_tile;     // current segment: tiles tile .. last_tile - 1 of (seq, head)

    __device__ static int tiles_of(int length) { return (length + TILE - 1) / TILE; }

    __device__ void enter(int new_seq, int new_slot) {
        seq = new_seq;
        slot = new_slot;
        length = context_lens[seq];
        tiles = tiles_of(length);
    }

    __device__ bool next() {
        if (position >= end) return false;
        while (position >= (before + tiles) * num_kv_heads) {
            before += tiles;
            enter(seq + 1, seq_slots[seq + 1]);
        }
        int offset = position - before * num_kv_heads;
        head = offset / tiles;
        tile = offset - head * tiles;
        last_tile = min(tiles, tile + end - position);
        position += last_tile - tile;
        return true;
    }

    __device__ int line_start() const { return before * num_kv_heads + head * tiles; }
};

__device__ __forceinline__ void consumers_sync() {
    asm volatile("bar.sync 1, %0;" ::"n"(CONSUMERS) : "memory");
}

// The walk over this block's stretch. Every warp plans for itself: a lane sums the tiles of its share
// of the sequences, a scan gives the line's length, and one lane finds where the stretch begins.
__device__ Walk plan(
    const int* context_lens, const int* seq_slots, int num_seqs, int num_kv_heads,
    Stretches& stretches) {
    int lane = threadIdx.x % 32;
    int share = ceil_div(num_seqs, 32);
    int begin = lane * share, stop = min(begin + share, num_seqs);
    // Read beside the length, though most lanes need none: one latency less on the way to a page.
    int slot = begin < num_seqs ? seq_slots[begin] : 0;
    int mine = 0;
#pragma unroll 4
    for (int i = begin; i < stop; i++) mine += Walk::tiles_of(context_lens[i]);
    int inclusive = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
        int below = __shfl_up_sync(~0u, inclusive, offset);
        if (lane >= offset) inclusive += below;
    }
    stretches = Stretches(__shfl_sync(~0u, inclusive, 31) * num_kv_heads, gridDim.x);
    Walk walk;
    walk.context_lens = context_lens;
    walk.seq_slots = seq_slots;
    walk.num_kv_heads = num_kv_heads;
    walk.position = stretches.start(blockIdx.x);
    walk.end = stretches.start(blockIdx.x + 1);
    int before = inclusive - mine, seq = begin;
    bool found = walk.position < inclusive * num_kv_heads;
    unsigned int lanes = __ballot_sync(~0u, found);
    int finder = lanes ? __ffs(lanes) - 1 : 0;
    if (lane == finder && found) {
        for (;; seq++) {
            int tiles = Walk::tiles_of(context_lens[seq]);
            if (walk.position < (before + tiles) * num_kv_heads) break;
            before += tiles;
        }
        if (seq != begin) slot = seq_slots[seq];
    }
    walk.before = __shfl_sync(~0u, before, finder);
    seq = __shfl_sync(~0u, seq, finder);
    slot = __shfl_sync(~0u, slot, finder);
    walk.enter(seq, slot);
    return walk;
}

// ---------------------------------------------------------------------------------------------
// Loading. A stage holds the tile's pages, or its part of a larger page, one after the other, each
// as it lies in memory: [K|V][half][rows][128 bytes] with rows = min(page size, TILE).

struct Pages {
    const uint8_t* kv;
    const int* page_table;
    int num_kv_heads, table_stride, page_shift;

    __device__ int page_size() const { return 1 << page_shift; }
    __device__ int rows() const { return min(page_size(), TILE); }
    __device__ const int* row_of(int slot) const {
        return page_table + (int64_t)slot * table_stride;
    }
    __device__ const uint8_t* block(int page, int head) const {
        return kv + kv_block_offset(page, head, 0, num_kv_heads, page_size(), HEAD_DIM);
    }
};

#if HAS_BULK_COPY
// The producer warp: every tile of the stretch into the ring, as the consumers empty it. Only the
// last tile of a sequence holds a token that the kernel before has written: only that one waits.
__device__ void produce(Walk walk, const Pages& pages, uint32_t stages, Shared& shared) {
    int lane = threadIdx.x % 32;
    int rows = pages.rows();
    int pages_per_tile = TILE / rows;
    int sub = lane / PIECES, piece = lane % PIECES;
    bool has_copy = sub < pages_per_tile;
    uint64_t policy = policy_evict_first();
    int stage = 0, parity = 1;  // a fresh barrier counts as having completed the phase before
    bool has_waited = false;
    int window_seq = -1, window = 0, page_ids = 0;  // the lanes hold 32 pages from column window on
    while (walk.next()) {
        const int* row = pages.row_of(walk.slot);
        int num_pages = (walk.length + pages.page_size() - 1) >> pages.page_shift;
#pragma unroll 1
        for (int tile = walk.tile; tile < walk.last_tile; tile++) {
            int column = (tile * TILE) >> pages.page_shift;
            if (window_seq != walk.seq || column < window ||
                column + pages_per_tile > window + 32) {
                window_seq = walk.seq;
                // The heads of a sequence have the same pages: where 32 are all, they stay.
                window = num_pages <= 32 ? 0 : column;
                page_ids = row[min(window + lane, num_pages - 1)];
            }
            int page = __shfl_sync(~0u, page_ids, (column - window + sub) & 31);
            // Whole groups of 16 rows, as the warps take them.
            int tokens = min(TILE, (walk.length - tile * TILE + 15) & ~15);
            uint32_t barrier = shared_address(&shared.full[stage]);
            mbarrier_wait(shared_address(&shared.empty[stage]), parity);
            if (!has_waited && tile == walk.tiles - 1) {
                pdl_wait();
                has_waited = true;
            }
            if (lane == 0) mbarrier_arrive_expect(barrier, tokens * TOKEN_BYTES);
            __syncwarp();
            int count = min(rows, tokens - sub * rows);
            if (has_copy && count > 0) {
                const uint8_t* from = pages.block(page, walk.head);
                uint32_t to = stages + stage * STAGE_BYTES + sub * rows * TOKEN_BYTES;
                if (count == pages.page_size()) {
                    if (piece == 0) bulk_copy(to, from, count * TOKEN_BYTES, barrier, policy);
                } else {
                    int first_row = (tile * TILE) & (pages.page_size() - 1) & ~(rows - 1);
                    from += (piece * pages.page_size() + first_row) * 128;
                    bulk_copy(to + piece * rows * 128, from, count * 128, barrier, policy);
                }
            }
            if (++stage == STAGES) stage = 0, parity ^= 1;
        }
    }
}
#else
// A warp's own loads: its 16 rows of each tile of the stretch, STAGES - 1 tiles ahead.
struct WarpLoads {
    Walk walk;
    const Pages& pages;
    uint32_t to;     // the warp's rows in stage 0
    int offset;      // of the warp's 16 rows in a tile
    int stage, page;
    bool more;

    __device__ WarpLoads(const Walk& start, const Pages& pages, uint32_t to, int offset)
        : walk(start), pages(pages), to(to), offset(offset), stage(0), page(0) {
        more = walk.next();
        find_page();
    }

    __device__ void find_page() {
        if (!more) return;
        int token = min(walk.tile * TILE + offset, walk.length - 1);
        page = pages.row_of(walk.slot)[token >> pages.page_shift];
    }

    // Starts the copies of one tile, and closes a group even where there is nothing left to copy.
    __device__ void issue() {
        if (more) {
            int token = walk.tile * TILE + offset;
            if (token < walk.length) {
                int lane = threadIdx.x % 32;
                const uint8_t* from = pages.block(page, walk.head) +
                                      (token & (pages.page_size() - 1)) * 128 + lane * 16;
                uint32_t target = to + stage * STAGE_BYTES + lane * 16;
#pragma unroll
                for (int piece = 0; piece < PIECES; piece++) {
#pragma unroll
                    for (int part = 0; part < 4; part++)
                        cp_async_16(target + piece * pages.rows() * 128 + part * 512,
                                    from + piece * pages.page_size() * 128 + part * 512);
                }
            }
            if (++walk.tile == walk.last_tile) more = walk.next();
            find_page();
        }
        if (++stage == STAGES) stage = 0;
        cp_async_commit();
    }
};
#endif

// ---------------------------------------------------------------------------------------------
// One warp's attention over its 16 tokens a tile

struct Accumulator {
    float o[HEAD_TILES][DIM_TILES][4];  // O^T: dims in rows, heads in columns
    float max[HEAD_TILES][2];           // heads 2t and 2t + 1, in base 2, of all lanes' tokens
    float sum[HEAD_TILES][2];           // the same, of this lane's tokens only

    __device__ void clear() {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) {
#pragma unroll
            for (int m = 0; m < DIM_TILES; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) o[n][m][i] = 0.0f;
            max[n][0] = max[n][1] = -INFINITY_F;
            sum[n][0] = sum[n][1] = 0.0f;
        }
    }
};

// Q^T as B fragments, straight from global memory; heads past the group are zero.
__device__ __forceinline__ void load_query(
    uint32_t (&query)[HEAD_TILES][K_STEPS][2], const bf16* q, int group) {
    int g = (threadIdx.x % 32) / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) {
        const uint32_t* row = (const uint32_t*)(q + (n * HEADS + g) * HEAD_DIM) + t;
        bool exists = n * HEADS + g < group;
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            query[n][k][0] = exists ? row[k * 8] : 0;
            query[n][k][1] = exists ? row[k * 8 + 4] : 0;
        }
    }
}

// Adds 16 tokens, of which `valid` (1 .. 16) exist. k and v: shared addresses of their rows.
template <bool MASKED>
__device__ __forceinline__ void attend(
    Accumulator& acc, const uint32_t (&query)[HEAD_TILES][K_STEPS][2], uint32_t k, uint32_t v,
    int half_bytes, int valid, float scale) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float s[HEAD_TILES][2][4];
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[n][0][i] = s[n][1][i] = 0.0f;
    // K as A: matrices (tokens 0-7, 8-15) x (dims 0-7, 8-15). Two chains of products, for latency.
    uint32_t row = lane % 16;
    uint32_t k_row = k + row * 128, k_chunk = ((lane / 16) ^ (row & 7)) << 4;
#pragma unroll
    for (int step = 0; step < K_STEPS; step++) {
        uint32_t a[4];
        ldmatrix_x4(a, k_row + (step / 4) * half_bytes + (k_chunk ^ ((step % 4) << 5)));
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
            mma_bf16(s[n][step & 1], a, query[n][step][0], query[n][step][1]);
    }

    uint32_t p[HEAD_TILES][2];
    bool rescale = false;
    float alpha[HEAD_TILES][2];
#pragma unroll
    for (int n = 0; n < HEAD_TILES; n++) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            x[i] = (s[n][0][i] + s[n][1][i]) * scale;
            if (MASKED && g + (i / 2) * 8 >= valid) x[i] = -INFINITY_F;
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            float top = fmaxf(x[j], x[j + 2]);
#pragma unroll
            for (int offset = 4; offset < 32; offset <<= 1)
                top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
            float updated = fmaxf(acc.max[n][j], top);
            alpha[n][j] = exp2_fast(acc.max[n][j] - updated);
            rescale |= acc.max[n][j] != updated;
            acc.max[n][j] = updated;
            x[j] = exp2_fast(x[j] - updated);
            x[j + 2] = exp2_fast(x[j + 2] - updated);
            acc.sum[n][j] = acc.sum[n][j] * alpha[n][j] + (x[j] + x[j + 2]);
        }
        p[n][0] = movmatrix_trans(pack_bf16(x[0], x[1]));
        p[n][1] = movmatrix_trans(pack_bf16(x[2], x[3]));
    }
    if (__any_sync(~0u, rescale)) {
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
#pragma unroll
            for (int m = 0; m < DIM_TILES; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) acc.o[n][m][i] *= alpha[n][i & 1];
    }

    // V^T as A: matrices (dims 0-7, 8-15) x (tokens 0-7, 8-15), transposed on the way.
    row = lane % 8 + (lane / 16) * 8;
    uint32_t v_row = v + row * 128, v_chunk = (((lane / 8) & 1) ^ (row & 7)) << 4;
    uint32_t keep[2] = {~0u, ~0u};  // of tokens 2t, 2t + 1 and 2t + 8, 2t + 9
    if (MASKED) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = 2 * t + 8 * i;
            keep[i] = (token < valid ? 0xffffu : 0u) | (token + 1 < valid ? 0xffff0000u : 0u);
        }
    }
#pragma unroll
    for (int m = 0; m < DIM_TILES; m++) {
        uint32_t a[4];
        ldmatrix_x4_trans(a, v_row + (m / 4) * half_bytes + (v_chunk ^ ((m % 4) << 5)));
        if (MASKED) {
            a[0] &= keep[0], a[1] &= keep[0];
            a[2] &= keep[1], a[3] &= keep[1];
        }
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++) mma_bf16(acc.o[n][m], a, p[n][0], p[n][1]);
    }
}

// ---------------------------------------------------------------------------------------------
// The end of a segment

// Adds 1 and returns what was there; at `limit` it wraps to 0, so the last arrival leaves a counter
// ready for the next launch. Orders the block's accesses before and after, at the GPU's scope.
__device__ __forceinline__ int atomic_inc_acq_rel(unsigned int* counter, unsigned int limit) {
    unsigned int old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old)
                 : "l"(counter), "r"(limit)
                 : "memory");
    return old;
}

struct Partials {
    float* base;

    // [8 * HEAD_TILES][HEAD_DIM] of O, then as many pairs (max, sum).
    static constexpr int FLOATS = HEAD_TILES * HEADS * (HEAD_DIM + 2);
    // Of split i of a pair that starts in block `first`. A block has one segment at most that began
    // before it, and one at most that ends after it.
    __device__ static int slot_of(int first, int split) {
        return 2 * (first + split) + (split == 0 ? 1 : 0);
    }
    __device__ float* o(int slot, int head) const {
        return base + (uint32_t)(slot * FLOATS + head * HEAD_DIM);
    }
    __device__ float2* max_sum(int slot, int head) const {
        return (float2*)(base + (uint32_t)(slot * FLOATS + HEAD_TILES * HEADS * HEAD_DIM)) + head;
    }
};

// Joins the four warps' results of heads n * 8 .. n * 8 + 7. Where the pair is whole in this block
// the result goes out, else to a partial slot. `turn` alternates between calls.
// Here and in the merge the code is kept short: it runs once or twice a launch, at the speed at which
// instructions are fetched.
__device__ void finish_heads(
    Accumulator& acc, int n, int num_heads, int turn, Shared& shared, bool whole, bf16* out,
    const Partials& partials, int slot) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float2 sum = make_float2(acc.sum[n][0], acc.sum[n][1]);
    if (g == 0) *(float2*)&shared.max[turn][warp][2 * t] = make_float2(acc.max[n][0], acc.max[n][1]);
#pragma unroll
    for (int offset = 4; offset < 32; offset <<= 1) {
        sum.x += __shfl_xor_sync(~0u, sum.x, offset);
        sum.y += __shfl_xor_sync(~0u, sum.y, offset);
    }
    consumers_sync();  // and the last reads of shared.o and shared.sum are over
    if (2 * t < num_heads) {
        float2 max = make_float2(-INFINITY_F, -INFINITY_F);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 other = *(const float2*)&shared.max[turn][w][2 * t];
            max.x = fmaxf(max.x, other.x), max.y = fmaxf(max.y, other.y);
        }
        // 0 for a warp without tokens.
        float scale[2] = {exp2_fast(acc.max[n][0] - max.x), exp2_fast(acc.max[n][1] - max.y)};
        if (g == 0)
            *(float2*)&shared.sum[warp][2 * t] = make_float2(sum.x * scale[0], sum.y * scale[1]);
#pragma unroll
        for (int m = 0; m < 2 * DIM_TILES; m++)
            *(float2*)&shared.o[warp][m * 8 + g][2 * t] = make_float2(
                acc.o[n][m / 2][m % 2 * 2] * scale[0], acc.o[n][m / 2][m % 2 * 2 + 1] * scale[1]);
    }
    consumers_sync();
    int dim = threadIdx.x % HEAD_DIM;
#pragma unroll 1
    for (int head = threadIdx.x / HEAD_DIM * 2; head < num_heads; head += 2 * CONSUMERS / HEAD_DIM) {
        float total[2] = {0.0f, 0.0f}, o[2] = {0.0f, 0.0f}, max[2] = {-INFINITY_F, -INFINITY_F};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float2 part = *(const float2*)&shared.o[w][dim][head];
            float2 part_sum = *(const float2*)&shared.sum[w][head];
            float2 part_max = *(const float2*)&shared.max[turn][w][head];
            o[0] += part.x, o[1] += part.y;
            total[0] += part_sum.x, total[1] += part_sum.y;
            max[0] = fmaxf(max[0], part_max.x), max[1] = fmaxf(max[1], part_max.y);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (head + j >= num_heads) break;
            int column = n * HEADS + head + j;
            if (whole) {
                out[column * HEAD_DIM + dim] = float_to_bf16(__fdividef(o[j], total[j]));
            } else {
                partials.o(slot, column)[dim] = o[j];
                if (dim == 0) *partials.max_sum(slot, column) = make_float2(max[j], total[j]);
            }
        }
    }
}

// Merges the partials of one (sequence, head) pair, heads n * 8 .. n * 8 + 7. A warp takes whole
// heads; with one or two heads, part of the splits of one. Its lanes weigh 32 splits at a time.
__device__ void merge_heads(
    int n, int num_heads, int first, int num_splits, Shared& shared, bf16* out,
    const Partials& partials) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int quad = lane % DIM_QUADS, row = lane / DIM_QUADS;
    int shift = num_heads == 1 ? 2 : num_heads == 2 ? 1 : 0;  // of the number of parts, 4, 2 or 1
    int parts = 1 << shift, part = warp >> (2 - shift);
#pragma unroll 1
    for (int head = warp & (3 >> shift); head < num_heads; head += WARPS) {
        int column = n * HEADS + head;
        float max = -INFINITY_F, total = 0.0f, weight = 0.0f;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
        for (int i = 0, begin = part; begin < num_splits;) {
            // The rows travel beside what they are weighed by: nothing waits before both are asked
            // for. Past the end the last row comes again, with weight 0.
            float2 mine = make_float2(-INFINITY_F, 0.0f);
            int lane_split = begin + lane * parts;
            if (i == 0 && lane_split < num_splits)
                mine = __ldcg(partials.max_sum(Partials::slot_of(first, lane_split), column));
            float4 o[MERGE_LOADS];
            int split = begin + (i + row) * parts;
#pragma unroll
            for (int k = 0; k < MERGE_LOADS; k++) {
                int clamped = min(split, num_splits - 1);
                int slot = k == 0 ? Partials::slot_of(first, clamped) : 2 * (first + clamped);
                o[k] = __ldcg((const float4*)partials.o(slot, column) + quad);
                split += ROWS_AT_ONCE * parts;
            }
            if (i == 0) {
                float updated = fmaxf(max, warp_max(mine.x));
                float alpha = exp2_fast(max - updated);
                weight = exp2_fast(mine.x - updated);
                max = updated;
                total = total * alpha + warp_sum(mine.y * weight);
                sum.x *= alpha, sum.y *= alpha, sum.z *= alpha, sum.w *= alpha;
            }
#pragma unroll
            for (int k = 0; k < MERGE_LOADS; k++) {
                float scale = __shfl_sync(~0u, weight, i + k * ROWS_AT_ONCE + row);
                sum.x += o[k].x * scale, sum.y += o[k].y * scale;
                sum.z += o[k].z * scale, sum.w += o[k].w * scale;
            }
            i += MERGE_LOADS * ROWS_AT_ONCE;
            if (i == 32 || begin + i * parts >= num_splits) begin += 32 * parts, i = 0;
        }
        if (ROWS_AT_ONCE == 2) {
            sum.x += __shfl_xor_sync(~0u, sum.x, 16), sum.y += __shfl_xor_sync(~0u, sum.y, 16);
            sum.z += __shfl_xor_sync(~0u, sum.z, 16), sum.w += __shfl_xor_sync(~0u, sum.w, 16);
        }
        if (parts == 1) {
            if (row == 0)
                ((uint2*)(out + (n * HEADS + head) * HEAD_DIM))[quad] = make_uint2(
                    pack_bf16(__fdividef(sum.x, total), __fdividef(sum.y, total)),
                    pack_bf16(__fdividef(sum.z, total), __fdividef(sum.w, total)));
        } else {
            if (row == 0) ((float4*)shared.merged[warp])[quad] = sum;
            if (lane == 0) shared.merged_max[warp] = max, shared.sum[warp][0] = total;
        }
    }
    if (parts == 1) return;
    consumers_sync();
    for (int i = threadIdx.x; i < num_heads * HEAD_DIM; i += CONSUMERS) {
        int head = i / HEAD_DIM;
        float max = -INFINITY_F, total = 0.0f, o = 0.0f;
        for (int w = head; w < WARPS; w += num_heads) max = fmaxf(max, shared.merged_max[w]);
        for (int w = head; w < WARPS; w += num_heads) {
            float scale = exp2_fast(shared.merged_max[w] - max);
            total += shared.sum[w][0] * scale;
            o += shared.merged[w][i % HEAD_DIM] * scale;
        }
        out[n * HEADS * HEAD_DIM + i] = float_to_bf16(__fdividef(o, total));
    }
}

// ---------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attention_decode(
    const bf16* __restrict__ q, const uint8_t* __restrict__ kv, bf16* __restrict__ out,
    const int* __restrict__ context_lens, const int* __restrict__ seq_slots,
    const int* __restrict__ page_table, float* partials_base, unsigned int* counters,
    int num_seqs, int num_kv_heads, int group, int table_stride, int page_shift, float scale) {
    extern __shared__ __align__(1024) uint8_t stages_memory[];
    __shared__ Shared shared;
    uint32_t stages = shared_address(stages_memory);
    int warp = threadIdx.x / 32;

#if HAS_BULK_COPY
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(shared_address(&shared.full[i]), 1);
            mbarrier_init(shared_address(&shared.empty[i]), WARPS);
        }
        mbarrier_init_fence();
    }
#endif
    Stretches stretches(0, 1);
    Walk walk = plan(context_lens, seq_slots, num_seqs, num_kv_heads, stretches);
#if HAS_BULK_COPY
    __syncthreads();  // the barriers are there
#endif
    const Pages pages = {kv, page_table, num_kv_heads, table_stride, page_shift};
#if HAS_BULK_COPY
    if (warp == WARPS) {
        produce(walk, pages, stages, shared);
        return;
    }
#endif
    pdl_wait();
    pdl_launch_dependents();
    int num_q_heads = num_kv_heads * group;
#pragma unroll 1
    for (int seq = blockIdx.x; seq < num_seqs; seq += gridDim.x) {
        if (context_lens[seq] != 0) continue;
        uint4* row = (uint4*)(out + (int64_t)seq * num_q_heads * HEAD_DIM);
#pragma unroll 1
        for (int i = threadIdx.x; i < num_q_heads * HEAD_DIM / 8; i += CONSUMERS)
            row[i] = make_uint4(0, 0, 0, 0);
    }

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
    const Partials partials = {partials_base};
    int stage = 0, parity = 0, turn = 0;
    uint32_t query[HEAD_TILES][K_STEPS][2];
    bool more = walk.next();
    int64_t q_row = (int64_t)walk.seq * num_q_heads + walk.head * group;
    if (more && PREFETCH_QUERY) load_query(query, q + q_row * HEAD_DIM, group);
    while (more) {
        if (!PREFETCH_QUERY) load_query(query, q + q_row * HEAD_DIM, group);
        // Before the first tile is there: the divisions cost nothing here.
        int line_start = walk.line_start();
        int first = stretches.owner(line_start);
        int num_splits = stretches.owner(line_start + walk.tiles - 1) - first + 1;
        int slot = Partials::slot_of(first, blockIdx.x - first);
        bf16* to = out + q_row * HEAD_DIM;
        unsigned int* counter = counters + walk.seq * num_kv_heads + walk.head;
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
        q_row = (int64_t)walk.seq * num_q_heads + walk.head * group;
        if (more && PREFETCH_QUERY) load_query(query, q + q_row * HEAD_DIM, group);

#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
            finish_heads(acc, n, min(HEADS, group - n * HEADS), turn ^ n, shared, num_splits == 1,
                         to, partials, slot);
        if (HEAD_TILES == 1) turn ^= 1;
        if (num_splits == 1) continue;

        // The barrier puts all threads' partials before thread 0's release.
        consumers_sync();
        if (threadIdx.x == 0)
            shared.is_last = atomic_inc_acq_rel(counter, num_splits - 1) == num_splits - 1;
        consumers_sync();
        if (!shared.is_last) continue;
#pragma unroll
        for (int n = 0; n < HEAD_TILES; n++)
            merge_heads(n, min(HEADS, group - n * HEADS), first, num_splits, shared, to, partials);
    }
}
