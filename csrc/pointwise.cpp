#include "pointwise.hpp"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "exponential.hpp"
#include "huge_pages.hpp"
#include "row_loop.hpp"
#include "simd.hpp"

namespace thyme {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kStrip = 32;  // rows whose part of a weight's gradient is added in float32

// Calls work(first, last) for strips of rows; a strip is one thread's, and always the same rows.
template <typename Work>
void for_each_strip(int64_t rows, int64_t width, int threads, const Work& work) {
    const int useful = useful_threads(rows * width, 1, threads);
    const int64_t strips = (rows + kStrip - 1) / kStrip;
#pragma omp parallel for schedule(static) num_threads(useful) if (useful > 1)
    for (int64_t strip = 0; strip < strips; ++strip) work(strip * kStrip, std::min((strip + 1) * kStrip, rows));
}

// Sums are over 16 lanes, then over these in order: the same bits wherever a row lies, whatever the processor adds at once.
THYME_INLINE float added(const float* lanes) {
    float total = 0.0f;
    for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
    return total;
}

THYME_CLONES float normalize(const float* __restrict x, const float* __restrict residual, const float* __restrict weight, int64_t width,
                             float eps, float* __restrict out, float* __restrict total) {
    alignas(64) float lanes[kLanes] = {};
    if (residual != nullptr) {
        for (int64_t i = 0; i < width; ++i) total[i] = x[i] + residual[i];
        x = total;
    }
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += x[i + j] * x[i + j];
    for (int64_t i = whole; i < width; ++i) lanes[i - whole] += x[i] * x[i];
    const float rstd = 1.0f / std::sqrt(added(lanes) / static_cast<float>(width) + eps);
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * rstd * weight[i];
    return rstd;
}

THYME_CLONES void denormalize(const float* __restrict x, float rstd, const float* __restrict weight, const float* __restrict grad,
                              const float* __restrict grad_total, int64_t width, float* __restrict grad_x,
                              float* __restrict grad_weight) {
    alignas(64) float lanes[kLanes] = {};
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += grad[i + j] * weight[i + j] * (x[i + j] * rstd);
    for (int64_t i = whole; i < width; ++i) lanes[i - whole] += grad[i] * weight[i] * (x[i] * rstd);
    const float mean = added(lanes) / static_cast<float>(width);
    if (grad_weight != nullptr)
        for (int64_t i = 0; i < width; ++i) grad_weight[i] += grad[i] * (x[i] * rstd);
    if (grad_total == nullptr)
        for (int64_t i = 0; i < width; ++i) grad_x[i] = (grad[i] * weight[i] - x[i] * rstd * mean) * rstd;
    else
        for (int64_t i = 0; i < width; ++i) grad_x[i] = (grad[i] * weight[i] - x[i] * rstd * mean) * rstd + grad_total[i];
}

THYME_INLINE float sigmoid(float x) {  // e^-x leaves float32 below -88, where the sigmoid is as good as 0
    const float down = x < -87.0f ? 87.0f : -x;
    return 1.0f / (1.0f + exponential(down));
}

THYME_CLONES void gate_row_back(const float* __restrict gate, const float* __restrict up, const float* __restrict grad, int64_t width,
                                float* __restrict grad_gate, float* __restrict grad_up) {
    for (int64_t i = 0; i < width; ++i) {
        const float z = gate[i], s = sigmoid(z), dy = grad[i];
        grad_gate[i] = dy * up[i] * s * (1.0f + z * (1.0f - s));
        grad_up[i] = dy * (z * s);
    }
}

THYME_CLONES void turn(const float* __restrict a, const float* __restrict cos, const float* __restrict sin, int64_t half, float sign,
                       float* __restrict out) {
    const float* const b = a + half;
    for (int64_t i = 0; i < half; ++i) {
        const float along = a[i] * cos[i], across = b[i] * sin[i] * sign;
        out[i] = along - across;
    }
    for (int64_t i = 0; i < half; ++i) {
        const float along = b[i] * cos[i], across = a[i] * sin[i] * sign;
        out[half + i] = along + across;
    }
}

size_t bytes(int64_t rows, int64_t width) { return static_cast<size_t>(rows * width) * sizeof(float); }

}  // namespace

THYME_CLONES void gate_row(const float* __restrict gate, const float* __restrict up, int64_t width, float* __restrict out) {
    for (int64_t i = 0; i < width; ++i) out[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

void rmsnorm(Rows<const float> x, const float* residual, const float* weight, int64_t rows, int64_t width, float eps, float* out,
             float* total, float* rstd, int threads) {
    prefer_huge_pages(out, bytes(rows, width));
    if (total != nullptr) prefer_huge_pages(total, bytes(rows, width));
    for_each_row(rows, useful_threads(rows * width, 1, threads), [&](int64_t row) {
        const int64_t at = row * width;
        const float r = normalize(x.at(row), residual == nullptr ? nullptr : residual + at, weight, width, eps, out + at,
                                  total == nullptr ? nullptr : total + at);
        if (rstd != nullptr) rstd[row] = r;
    });
}

void rmsnorm_gradient(Rows<const float> x, const float* rstd, const float* weight, const float* grad, const float* grad_total,
                      int64_t rows, int64_t width, float* grad_x, float* grad_weight, int threads) {
    prefer_huge_pages(grad_x, bytes(rows, width));
    const int64_t strips = (rows + kStrip - 1) / kStrip;
    std::vector<float> parts(static_cast<size_t>(grad_weight == nullptr ? 0 : strips * width));
    for_each_strip(rows, width, threads, [&](int64_t first, int64_t last) {
        float* const part = grad_weight == nullptr ? nullptr : parts.data() + first / kStrip * width;
        for (int64_t row = first; row < last; ++row) {
            const int64_t at = row * width;
            denormalize(x.at(row), rstd[row], weight, grad + at, grad_total == nullptr ? nullptr : grad_total + at, width, grad_x + at,
                        part);
        }
    });
    if (grad_weight == nullptr) return;
    std::vector<double> sums(static_cast<size_t>(width));
    for (int64_t strip = 0; strip < strips; ++strip)
        for (int64_t i = 0; i < width; ++i) sums[static_cast<size_t>(i)] += static_cast<double>(parts[static_cast<size_t>(strip * width + i)]);
    for (int64_t i = 0; i < width; ++i) grad_weight[i] = static_cast<float>(sums[static_cast<size_t>(i)]);
}

void swiglu(Rows<const float> gate, Rows<const float> up, int64_t rows, int64_t width, float* out, int threads) {
    prefer_huge_pages(out, bytes(rows, width));
    for_each_row(rows, useful_threads(rows * width, 3, threads),
                 [&](int64_t row) { gate_row(gate.at(row), up.at(row), width, out + row * width); });
}

void swiglu_gradient(Rows<const float> gate, Rows<const float> up, const float* grad, int64_t rows, int64_t width,
                     Rows<float> grad_gate, Rows<float> grad_up, int threads) {
    prefer_huge_pages(grad_gate.data, bytes(rows, grad_gate.outer_step));
    if (grad_up.data != grad_gate.data + width) prefer_huge_pages(grad_up.data, bytes(rows, grad_up.outer_step));
    for_each_strip(rows, width, threads, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            gate_row_back(gate.at(row), up.at(row), grad + row * width, width, grad_gate.at(row), grad_up.at(row));
    });
}

void turn_heads(Rows<const float> heads, const float* cos, const float* sin, int64_t tokens, int64_t num_heads, int64_t half,
                float sign, float* out, int threads) {
    prefer_huge_pages(out, bytes(tokens * num_heads, 2 * half));
    turn_heads(heads, cos, sin, tokens, num_heads, half, out, threads,
               [&](const float* head, const float* c, const float* s, float* to) { turn(head, c, s, half, sign, to); });
}

void turn_and_store(const NewTokens<float>& args, int threads) {
    turn_and_store(args, threads, [&](const float* head, const float* cos, const float* sin, float* out) {
        turn(head, cos, sin, args.half, 1.0f, out);
    });
}

}  // namespace thyme
