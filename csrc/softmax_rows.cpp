#include "softmax_rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "exponential.hpp"
#include "huge_pages.hpp"
#include "simd.hpp"

namespace thyme {
namespace {

// 16 floats: with every row at the start of one, compiled loops add in the same order wherever the memory lies.
struct alignas(64) Vector {
    float lanes[16];
};

constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 512;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// x = z - largest, finite, so that e^x x is 0 and not NaN where z is -inf.
THYME_INLINE float shifted(float z, float largest) {
    const float x = z - largest;
    return x < -1e30f ? -1e30f : x;
}

struct Sums {
    float largest;
    double total = 0, x_total = 0, tempered = 0;  // of e^x, x e^x and e^(x / tau)
};

// Turns a row into e^(x / tau).
THYME_CLONES Sums soften(float* row, int64_t width, float inverse_tau) {
    float largest = -kInfinity;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < width; ++i) largest = row[i] > largest ? row[i] : largest;
    Sums sums{largest};
    for (int64_t begin = 0; begin < width; begin += kChunk) {
        const int64_t end = std::min(begin + kChunk, width);
        float total = 0, x_total = 0, tempered = 0;
        if (inverse_tau == 1.0f) {
#pragma omp simd reduction(+ : total, x_total)
            for (int64_t i = begin; i < end; ++i) {
                const float x = shifted(row[i], largest), e = exponential(x);
                total += e;
                x_total += e * x;
                row[i] = e;
            }
            tempered = total;
        } else {
#pragma omp simd reduction(+ : total, x_total, tempered)
            for (int64_t i = begin; i < end; ++i) {
                const float x = shifted(row[i], largest), e = exponential(x), power = exponential(x * inverse_tau);
                total += e;
                x_total += e * x;
                tempered += power;
                row[i] = power;
            }
        }
        sums.total += total;
        sums.x_total += x_total;
        sums.tempered += tempered;
    }
    return sums;
}

THYME_CLONES void scale(const float* __restrict row, int64_t size, float factor, float* __restrict out) {
    for (int64_t i = 0; i < size; ++i) out[i] = row[i] * factor;
}

// Of numbers that are float32 products, as `scale` makes them; in whole vectors.
THYME_CLONES double sum_scaled(const float* row, int64_t size, float factor) {
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < size; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += static_cast<double>(row[i + j] * factor);
    double total = 0;
    for (const double lane : lanes) total += lane;
    return total;
}

// The first place at which the sum of factor row passes u of the whole; -1 where it never does, since nothing is in it.
int64_t find_drawn(const float* row, int64_t width, float factor, double u, double* cdf) {
    double total = 0;
    const int64_t chunks = (width + kChunk - 1) / kChunk;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * kChunk;
        total += sum_scaled(row + begin, std::min(kChunk, width - begin), factor);
        cdf[chunk] = total;
    }
    const double target = u * total;
    int64_t chunk = 0;
    while (chunk < chunks && !(cdf[chunk] > target)) ++chunk;
    if (chunk == chunks) return -1;
    double sum = chunk == 0 ? 0.0 : cdf[chunk - 1];
    int64_t last = -1;  // where rounding leaves the sum short of the chunk's own
    for (int64_t i = chunk * kChunk; i < std::min((chunk + 1) * kChunk, width); ++i) {
        const float p = row[i] * factor;
        sum += static_cast<double>(p);
        if (sum > target) return i;
        if (p > 0.0f) last = i;
    }
    return last;
}

// Turns a row into factor e^(x / tau - log_total).
THYME_CLONES void differentiate(float* row, int64_t width, float largest, float inverse_tau, float log_total, float factor) {
    for (int64_t i = 0; i < width; ++i)
        row[i] = factor * exponential(shifted(row[i], largest) * inverse_tau - log_total);
}

// The same, less h p_1 (log p_1 + entropy).
THYME_CLONES void differentiate(float* row, int64_t width, float largest, float inverse_tau, float log_total, float factor,
                                float log_total_raw, float entropy, float h) {
    for (int64_t i = 0; i < width; ++i) {
        const float x = shifted(row[i], largest), log_p = x - log_total_raw;
        row[i] = factor * exponential(x * inverse_tau - log_total) - h * exponential(log_p) * (log_p + entropy);
    }
}

int64_t whole_vectors(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// Row `r` as the loops above take it.
void copy_row(const LogitRows& rows, int64_t r, float* to) {
    std::memcpy(to, rows.z + r * rows.step, static_cast<size_t>(rows.vocab_size) * sizeof(float));
    for (int64_t i = 0; i < rows.num_banned; ++i) to[rows.banned[i]] = -kInfinity;
    std::fill(to + rows.vocab_size, to + whole_vectors(rows.vocab_size), -kInfinity);
}

bool is_greedy(const LogitRows& rows, int64_t r) { return rows.tau != nullptr && rows.tau[r] == 0.0f; }

// 1 at tau 0, which is asked for elsewhere.
float tau_of(const LogitRows& rows, int64_t r) {
    constexpr float kLeast = 1e-30f;  // its inverse is finite
    return rows.tau == nullptr || is_greedy(rows, r) ? 1.0f : std::max(rows.tau[r], kLeast);
}

float inverse_tau(const LogitRows& rows, int64_t r) { return 1.0f / tau_of(rows, r); }

struct Logs {
    float total, total_raw, entropy;
};

Logs logs_of(const Sums& sums) {
    const double raw = std::log(sums.total), tempered = sums.tempered == sums.total ? raw : std::log(sums.tempered);
    return {static_cast<float>(tempered), static_cast<float>(raw), static_cast<float>(raw - sums.x_total / sums.total)};
}

// The first of a row's largest logits; `row` is memory to work in.
int64_t first_largest(const LogitRows& rows, int64_t r, float* row, float largest) {
    copy_row(rows, r, row);
    return std::find(row, row + rows.vocab_size - 1, largest) - row;
}

// Calls work(r, scratch of one row) for each row.
template <typename Work>
void for_each_row(const LogitRows& rows, int threads, const Work& work) {
    constexpr int64_t kWorthAThread = 30'000;  // logits: about 30 us; waking a thread costs a few
    const auto useful = static_cast<int>(std::clamp<int64_t>(rows.rows * rows.vocab_size / kWorthAThread, 1, std::max(threads, 1)));
#pragma omp parallel num_threads(useful) if (useful > 1)
    {
        const std::unique_ptr<Vector[]> scratch(new Vector[static_cast<size_t>(whole_vectors(rows.vocab_size) / kLanes)]);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows.rows; ++r) work(r, scratch[0].lanes);
    }
}

}  // namespace

void softmax_rows(const LogitRows& rows, float* stats, float* p, int64_t p_step, int threads) {
    for_each_row(rows, threads, [&](int64_t r, float* row) {
        float* const out = stats + r;
        if (rows.counted != nullptr && rows.counted[r] == 0) {
            for (int plane = 0; plane < 4; ++plane) out[plane * rows.rows] = 0.0f;
            return;
        }
        copy_row(rows, r, row);
        const Sums sums = soften(row, whole_vectors(rows.vocab_size), inverse_tau(rows, r));
        const Logs logs = logs_of(sums);
        out[0] = sums.largest;
        out[rows.rows] = logs.total;
        out[2 * rows.rows] = logs.total_raw;
        out[3 * rows.rows] = logs.entropy;
        if (p == nullptr) return;
        float* const to = p + r * p_step;
        if (is_greedy(rows, r)) {
            std::fill(to, to + rows.vocab_size, 0.0f);
            to[first_largest(rows, r, row, sums.largest)] = 1.0f;
        } else {
            scale(row, rows.vocab_size, static_cast<float>(1.0 / sums.tempered), to);
        }
    });
}

void draw_rows(const LogitRows& rows, const double* u, int64_t* tokens, float* drawn, int threads) {
    for_each_row(rows, threads, [&](int64_t r, float* row) {
        const int64_t width = whole_vectors(rows.vocab_size);
        const bool greedy = is_greedy(rows, r);
        copy_row(rows, r, row);
        const Sums sums = soften(row, width, inverse_tau(rows, r));
        const Logs logs = logs_of(sums);
        int64_t token;
        if (greedy) {
            token = first_largest(rows, r, row, sums.largest);
        } else {
            const std::unique_ptr<double[]> cdf(new double[static_cast<size_t>((width + kChunk - 1) / kChunk)]);
            token = find_drawn(row, width, static_cast<float>(1.0 / sums.tempered), u[r], cdf.get());
            if (token < 0) token = rows.vocab_size - 1;  // of a row that will be refused
        }
        const float x = rows.z[r * rows.step + token] - sums.largest;
        tokens[r] = token;
        drawn[r] = greedy ? 0.0f : x / tau_of(rows, r) - logs.total;
        drawn[rows.rows + r] = x - logs.total_raw;
        drawn[2 * rows.rows + r] = logs.entropy;
    });
}

void softmax_rows_gradient(const LogitRows& rows, const int64_t* targets, const float* stats, const float* g, const float* h,
                           float* dz, int64_t dz_step, int64_t columns, int threads) {
    if (rows.rows > 0) prefer_huge_pages(dz, static_cast<size_t>((rows.rows - 1) * dz_step + columns) * sizeof(float));
    for_each_row(rows, threads, [&](int64_t r, float* row) {
        float* const out = dz + r * dz_step;
        const float bonus = h == nullptr ? 0.0f : h[r];
        if (g[r] == 0.0f && bonus == 0.0f) {
            std::fill(out, out + columns, 0.0f);
            return;
        }
        copy_row(rows, r, row);
        const float* const of = stats + r;
        const float largest = of[0], log_total = of[rows.rows], inverse = inverse_tau(rows, r), scaled = g[r] * inverse;
        const int64_t width = whole_vectors(rows.vocab_size);
        if (bonus == 0.0f)
            differentiate(row, width, largest, inverse, log_total, -scaled);
        else
            differentiate(row, width, largest, inverse, log_total, -scaled, of[2 * rows.rows], of[3 * rows.rows], bonus);
        row[targets[r]] += scaled;
        std::memcpy(out, row, static_cast<size_t>(rows.vocab_size) * sizeof(float));
        std::fill(out + rows.vocab_size, out + columns, 0.0f);
    });
}

}  // namespace thyme
