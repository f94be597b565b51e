// All layers of a decoder for the tokens of one step on a CPU, in one call: what PackedDecoder (thyme/model/packed_decoder.py) calls
// one by one, on the same numbers. Between the calls nothing is checked, converted or allocated.
#pragma once

#include <cstdint>
#include <vector>

#include "packed_product.hpp"
#include "paged_attention.hpp"
#include "pointwise.hpp"

namespace thyme {

template <typename T>
struct Projection {
    const T* weight;  // packed
    const T* bias;    // or null
};

template <typename T>
struct Norm {
    const T* weight;  // [hidden]
    float eps;
};

template <typename T>
struct DecoderLayer {
    Norm<T> input_norm;
    Projection<T> qkv, out;
    Norm<T> mlp_norm;
    Projection<T> gate_up, down;
    T *k_cache, *v_cache;  // [blocks, block_size, kv_heads, dim]
};

template <typename T>
struct DecoderStep {
    const T* x;                   // [tokens, hidden]
    int64_t hidden, intermediate;
    std::vector<DecoderLayer<T>> layers;
    Norm<T> last_norm;
    NewTokens<T> tokens;          // what a layer has of its own is filled in
    PagedAttention<T> attention;  // as above
    T* out;                       // [tokens, hidden], normalized
};

template <typename T>
void run_layers(const DecoderStep<T>& step, int threads);

}  // namespace thyme
