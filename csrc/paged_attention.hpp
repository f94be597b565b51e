// Attention of packed queries over a paged key/value cache on the CPU: decode and chunked prefill alike. Queries, keys, values
// and output are float32 or bfloat16; scores, softmax and sums are float32 either way.
//
// The query heads that share a key head are done together, and for prefill several queries too, so keys and values are read
// once for all of them. Softmax is online (Milakov and Gimelshein, 2018) over chunks of 64 keys counted from position 0: what
// a query yields depends on the query and its context alone, bit for bit, not on its neighbours in the batch, on how a prompt
// was cut into chunks, or on the number of threads. Slots past the context are never read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace thyme {

// The upper half of a float32.
struct Bfloat16 {
    uint16_t bits;
};

// T is float or Bfloat16. Strides count elements; the last dimension is dense.
template <typename T>
struct PagedAttention {
    const T* q;  // [tokens, q_heads, dim]
    int64_t q_token, q_head;
    const T* k;  // [blocks, block_size, kv_heads, dim]
    int64_t k_block, k_slot, k_head;
    const T* v;  // as k
    int64_t v_block, v_slot, v_head;
    const int32_t* block_tables;  // [sequences, table_width]
    int64_t table_row;
    const int32_t* context_lens;  // [sequences], counting the query tokens
    const int32_t* cu_seqlens_q;  // [sequences + 1]
    T* out;                       // [tokens, q_heads, dim]
    int64_t out_token, out_head;
    int64_t tokens, sequences, q_heads, kv_heads, dim, blocks, block_size, table_width;
    float scale;
};

// Throws std::invalid_argument, before anything is written, when lengths and tables do not fit together.
template <typename T>
void check_paged_attention(const PagedAttention<T>& args);

// Instruction sets this processor can run, the best last.
std::vector<std::string> paged_attention_levels();

// Runs on at most `threads` threads; few enough keys stay on the caller's. `level` is "best" or one of the above.
template <typename T>
void paged_attention(const PagedAttention<T>& args, int threads, const std::string& level);

}  // namespace thyme
