// The forward passes of pointwise.hpp in bfloat16: computed in float32, rounded where the references round.
#include <algorithm>
#include <cmath>
#include <memory>

#include "exponential.hpp"
#include "pointwise.hpp"
#include "row_loop.hpp"
#include "simd.hpp"

namespace thyme {
namespace {

constexpr int64_t kLanes = 16;

// Calls work(row, scratch of one row) for each row; a row is one thread's.
template <typename Work>
void for_each_widened_row(int64_t rows, int64_t width, int threads, const Work& work) {
    const int useful = useful_threads(rows * width, 1, threads);
#pragma omp parallel num_threads(useful) if (useful > 1)
    {
        const std::unique_ptr<float[]> scratch(new float[static_cast<size_t>(width)]);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) work(row, scratch.get());
    }
}

THYME_CLONES void widen(const Bfloat16* __restrict x, int64_t width, float* __restrict out) {
    for (int64_t i = 0; i < width; ++i) out[i] = widened(x[i]);
}

THYME_CLONES void add(const Bfloat16* __restrict x, const Bfloat16* __restrict residual, int64_t width, Bfloat16* __restrict total,
                      float* __restrict out) {
    for (int64_t i = 0; i < width; ++i) {
        total[i] = rounded(widened(x[i]) + widened(residual[i]));
        out[i] = widened(total[i]);
    }
}

// Sums are over 16 lanes, then over these in order, as in float32.
THYME_CLONES float normalize(const float* __restrict x, const Bfloat16* __restrict weight, int64_t width, float eps,
                             Bfloat16* __restrict out) {
    alignas(64) float lanes[kLanes] = {};
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
    for (int64_t i = whole; i < width; ++i) lanes[i - whole] += x[i] * x[i];
    float total = 0.0f;
    for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
    const float rstd = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; ++i) out[i] = rounded(widened(rounded(x[i] * rstd)) * widened(weight[i]));
    return rstd;
}

THYME_CLONES void turn(const Bfloat16* __restrict a, const float* __restrict cos, const float* __restrict sin, int64_t half,
                       float sign, Bfloat16* __restrict out) {
    const Bfloat16* const b = a + half;
    for (int64_t i = 0; i < half; ++i) {
        const float along = widened(a[i]) * cos[i], across = widened(b[i]) * sin[i] * sign;
        out[i] = rounded(along - across);
    }
    for (int64_t i = 0; i < half; ++i) {
        const float along = widened(b[i]) * cos[i], across = widened(a[i]) * sin[i] * sign;
        out[half + i] = rounded(along + across);
    }
}

}  // namespace

THYME_CLONES void gate_row(const Bfloat16* __restrict gate, const Bfloat16* __restrict up, int64_t width, Bfloat16* __restrict out) {
    for (int64_t i = 0; i < width; ++i) {
        const float z = widened(gate[i]), down = z < -87.0f ? 87.0f : -z;  // e^-z leaves float32 below -88
        const float silu = widened(rounded(z / (1.0f + exponential(down))));
        out[i] = rounded(silu * widened(up[i]));
    }
}

void rmsnorm(Rows<const Bfloat16> x, const Bfloat16* residual, const Bfloat16* weight, int64_t rows, int64_t width, float eps,
             Bfloat16* out, Bfloat16* total, float* rstd, int threads) {
    for_each_widened_row(rows, width, threads, [&](int64_t row, float* wide) {
        const int64_t at = row * width;
        if (residual == nullptr)
            widen(x.at(row), width, wide);
        else
            add(x.at(row), residual + at, width, total + at, wide);
        const float r = normalize(wide, weight, width, eps, out + at);
        if (rstd != nullptr) rstd[row] = r;
    });
}

void swiglu(Rows<const Bfloat16> gate, Rows<const Bfloat16> up, int64_t rows, int64_t width, Bfloat16* out, int threads) {
    for_each_row(rows, useful_threads(rows * width, 3, threads),
                 [&](int64_t row) { gate_row(gate.at(row), up.at(row), width, out + row * width); });
}

void turn_heads(Rows<const Bfloat16> heads, const float* cos, const float* sin, int64_t tokens, int64_t num_heads, int64_t half,
                float sign, Bfloat16* out, int threads) {
    turn_heads(heads, cos, sin, tokens, num_heads, half, out, threads,
               [&](const Bfloat16* head, const float* c, const float* s, Bfloat16* to) { turn(head, c, s, half, sign, to); });
}

void turn_and_store(const NewTokens<Bfloat16>& args, int threads) {
    turn_and_store(args, threads, [&](const Bfloat16* head, const float* cos, const float* sin, Bfloat16* out) {
        turn(head, cos, sin, args.half, 1.0f, out);
    });
}

}  // namespace thyme
