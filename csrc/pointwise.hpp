// The small layers of a transformer on a CPU, float32, forward and backward: RMSNorm, SwiGLU, rotary embedding.
//
// All of them are bound by memory: each row is read once and written once each way. What a row yields does not depend on how many
// rows or threads there are, bit for bit. The meaning is that of the references in kernels/rmsnorm.py, swiglu.py and mrope.py.
#pragma once

#include <cstdint>

#include "bfloat16.hpp"

namespace thyme {

// Rows of two levels, as heads [tokens, heads, width] lie in a projection: row i starts at (i / inner) * outer_step +
// (i % inner) * inner_step. Dense rows: inner 1, outer_step width.
template <typename Float>
struct Rows {
    Float* data;
    int64_t inner, outer_step, inner_step;
    Float* at(int64_t row) const { return data + row / inner * outer_step + row % inner * inner_step; }
};

// out = weight u, u = x rstd with rstd [rows] = 1 / sqrt(mean(x^2) + eps). x is delta + residual where there is a residual
// [rows, width], and is then written to total [rows, width]. rstd may be null.
void rmsnorm(Rows<const float> x, const float* residual, const float* weight, int64_t rows, int64_t width, float eps, float* out,
             float* total, float* rstd, int threads);

// grad_x = rstd (w dy - u mean(w dy u)) + grad_total; grad_weight [width] = sum over rows of dy u, added 32 rows at a time in float32
// and in float64 over these, whatever the threads. grad_total and grad_weight may be null.
void rmsnorm_gradient(Rows<const float> x, const float* rstd, const float* weight, const float* grad, const float* grad_total,
                      int64_t rows, int64_t width, float* grad_x, float* grad_weight, int threads);

// out = silu(gate) up; of one row, and of many.
void gate_row(const float* gate, const float* up, int64_t width, float* out);
void swiglu(Rows<const float> gate, Rows<const float> up, int64_t rows, int64_t width, float* out, int threads);
void swiglu_gradient(Rows<const float> gate, Rows<const float> up, const float* grad, int64_t rows, int64_t width,
                     Rows<float> grad_gate, Rows<float> grad_up, int threads);

// Turns pair (x[j], x[j + half]) of each of the heads of a token by its angle; sign -1 turns back. cos, sin [tokens, half].
void turn_heads(Rows<const float> heads, const float* cos, const float* sin, int64_t tokens, int64_t num_heads, int64_t half,
                float sign, float* out, int threads);

// New tokens as a projection leaves them: of each, `queries` heads that are turned into q [tokens, queries, 2 half], then as many keys
// as values. Keys, turned, and values go to row slots[token] of the caches, [places, keys, 2 half]; a slot of -1 is nowhere.
template <typename T>
struct NewTokens {
    Rows<const T> heads;
    const float *cos, *sin;
    const int64_t* slots;
    int64_t tokens, queries, keys, half;
    T *q, *k_cache, *v_cache;
};

void turn_and_store(const NewTokens<float>& args, int threads);

// The forward passes in bfloat16 (pointwise_bf16.cpp): computed in float32 and rounded where transformers rounds, which is the sum
// with the residual, u, and silu; rstd, cos and sin are float32.
void rmsnorm(Rows<const Bfloat16> x, const Bfloat16* residual, const Bfloat16* weight, int64_t rows, int64_t width, float eps,
             Bfloat16* out, Bfloat16* total, float* rstd, int threads);
void gate_row(const Bfloat16* gate, const Bfloat16* up, int64_t width, Bfloat16* out);
void swiglu(Rows<const Bfloat16> gate, Rows<const Bfloat16> up, int64_t rows, int64_t width, Bfloat16* out, int threads);
void turn_heads(Rows<const Bfloat16> heads, const float* cos, const float* sin, int64_t tokens, int64_t num_heads, int64_t half,
                float sign, Bfloat16* out, int threads);
void turn_and_store(const NewTokens<Bfloat16>& args, int threads);

}  // namespace thyme
