/*
The first kernels of a step: page-table updates and the embedding.

    apply_updates  page_table[slot[i]][column[i]] = page[i] for i < header[NUM_UPDATES]; the count is
                   read on the device, so that a graph's launch serves every step
    embed          out[t] = weight[id]; id -1 (a decode row) stands for last_token[seq_slot[t]]
    reset_counts   one slot's row of the token-count table, from its history (a cold path)

A count is 16 bits (backend/step.py): bit 14 says that the id is in the prompt, the 14 below count it
in the output, up to their maximum.

Launch: apply_updates grid (1), block 256. embed grid (num_tokens), block hidden / 8 rounded up to a
warp, hidden <= 8192 and a multiple of 8. reset_counts grid (1), block 1024.
Programmatic dependent launch is allowed for all.
*/
#include "common.cuh"  // defines: bf16, pdl_wait, pdl_launch_dependents

#define HEADER_NUM_UPDATES 5
#define IN_PROMPT 0x4000
#define COUNT_MASK 0x3fff

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
