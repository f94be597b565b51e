// x W^T + b on a CPU, with a weight that was rearranged once, in float32 or bfloat16; sums are float32.
//
// A weight lies in panels of 32 outputs: of each input in turn its 32 weights, in bfloat16 of each pair of inputs its 32 pairs. Each
// number of the result is one chain of multiply-adds over the inputs in order, so that a row has the same bits whatever the rows
// beside it, their number and the threads; the bias is added last.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bfloat16.hpp"

namespace thyme {

constexpr int64_t kPanel = 32;

// Numbers that a weight [outputs, inputs] takes when it is packed; the last panel is filled up with zeros.
constexpr int64_t packed_size(int64_t outputs, int64_t inputs) { return (outputs + kPanel - 1) / kPanel * kPanel * inputs; }

// Instruction sets in which this processor multiplies numbers of type T, the best last; none: there is no product. In bfloat16
// `inputs` must be even.
template <typename T>
std::vector<std::string> product_levels();

template <typename T>
void pack_weight(const T* weight, int64_t outputs, int64_t inputs, T* packed, int threads);

template <typename T>
struct Product {
    const T* x;  // [rows, inputs]
    int64_t rows, inputs, outputs;
    const T* weight;  // packed
    const T* bias;    // [outputs], or null
    T* out;           // [rows, outputs]
    bool gates;       // the outputs are gates, then as many values: out [rows, outputs / 2] = silu(gate) value. Panels are whole
};

// Whether the outputs of a product can be gates and values.
constexpr bool can_gate(int64_t outputs) { return outputs % (2 * kPanel) == 0; }

// `level` is "best" or one of the above.
template <typename T>
void packed_product(const Product<T>& args, int threads, const std::string& level);

}  // namespace thyme
