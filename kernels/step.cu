/*
The first kernels of a step: the plan's words, page-table updates and the embedding.

    copy_ranges    words between pinned host memory and the device, in one launch: the copy engine
                   would cost some 15 us of waiting between it and the kernels around it
    apply_updates  page_table[slot[i]][column[i]] = page[i] for i < header[NUM_UPDATES]; the count is
                   read on the device, so that a graph's launch serves every step
    embed          out[t] = weight[id]; id -1 (a decode row) stands for last_token[seq_slot[t]]
    reset_counts   one slot's row of the token-count table, from its history (a cold path)

A count is 16 bits (backend/step.py): bit 14 says that the id is in the prompt, the 14 below count it
in the output, up to their maximum.

Launch: copy_ranges grid (ceil(longest range / 256), number of ranges), block 256; a range is (first
word, number of words) in both memories. apply_updates grid (1), block 256. embed grid (num_tokens),
block hidden / 8 rounded up to a warp, hidden <= 8192 and a multiple of 8. reset_counts grid (1), block
1024.
Programmatic dependent launch is allowed for all.
*/
#include "common.cuh"  // defines: bf16, pdl_wait, pdl_launch_dependents

#define HEADER_NUM_UPDATES 5
#define IN_PROMPT 0x4000
#define COUNT_MASK 0x3fff

struct Range {
    int first, count;
};

// Host memory is not cached: what the host wrote before the launch is what is read.
extern "C" __global__ void __launch_bounds__(256) copy_ranges(
    int* to, const int* from, int first0, int count0, int first1, int count1, int first2,
    int count2, int first3, int count3, int first4, int count4, int first5, int count5, int first6,
    int count6, int first7, int count7, int first8, int count8, int first9, int count9) {
    const Range ranges[10] = {{first0, count0}, {first1, count1}, {first2, count2},
                              {first3, count3}, {first4, count4}, {first5, count5},
                              {first6, count6}, {first7, count7}, {first8, count8},
                              {first9, count9}};
    Range range = ranges[0];
#pragma unroll
    for (int i = 1; i < 10; i++)
        if (blockIdx.y == i) range = ranges[i];
    pdl_wait();
    const int i = blockIdx.x * 256 + threadIdx.x;
    if (i < range.count)
        to[range.first + i] = *(const volatile int*)(from + range.first + i);
}

extern "C" __global__ void apply_updates(
    int* page_table, int max_pages, const int* header, const int* slots, const int* columns,
    const int* pages) {
    pdl_wait();
    const int num_updates = header[HEADER_NUM_UPDATES];
    for (int i = threadIdx.x; i < num_updates; i += blockDim.x)
        page_table[(int64_t)slots[i] * max_pages + columns[i]] = pages[i];
}

extern "C" __global__ void embed(
    bf16* out, const bf16* weight, const int* input_ids, const int* seq_slots,
    const int* last_token, int hidden) {
    pdl_wait();
    pdl_launch_dependents();
    const int token = blockIdx.x;
    int id = input_ids[token];
    if (id < 0) id = last_token[seq_slots[token]];
    const int column = threadIdx.x * 8;
    if (column < hidden)
        *(uint4*)(out + (int64_t)token * hidden + column) =
            *(const uint4*)(weight + (int64_t)id * hidden + column);
}

extern "C" __global__ void reset_counts(
    uint16_t* counts, const int* tokens, int num_tokens, int num_prompt, int vocab_size) {
    pdl_wait();
    for (int id = threadIdx.x; id < vocab_size; id += blockDim.x) counts[id] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < num_tokens; i += blockDim.x) {
        uint16_t* count = counts + tokens[i];
        uint16_t old = *count, assumed;
        do {
            assumed = old;
            uint16_t next = assumed | IN_PROMPT;
            if (i >= num_prompt) next = (assumed & COUNT_MASK) < COUNT_MASK ? assumed + 1 : assumed;
            old = atomicCAS(count, assumed, next);
        } while (old != assumed);
    }
}
