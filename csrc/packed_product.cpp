#include "packed_product.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "pointwise.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define THYME_HAS_X86_LEVELS
#include <immintrin.h>
#endif

namespace thyme {
namespace {

constexpr int64_t kUnitsAtOnce = 1024;  // of a panel: 128 KiB, which stay in the second cache while rows go by
constexpr int64_t kRowsAtOnce = 252;    // whose sums, 32 KiB, stay in the first
[[maybe_unused]] constexpr int64_t kAhead = 8192;  // 32 KiB: what memory needs to keep up with few rows

// What an input of float32 takes, or a pair of bfloat16: 32 bits, whatever they mean.
struct [[gnu::may_alias]] Unit {
    float bits;
};

#define INLINE [[gnu::always_inline]] static inline

#ifdef THYME_HAS_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define THYME_LEVEL 3
namespace v3 {
#include "product_tile.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#undef THYME_LEVEL
#define THYME_LEVEL 4
namespace v4 {
#include "product_tile.inc"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
#undef THYME_LEVEL
#define THYME_LEVEL 5
namespace v4_bf16 {
#include "product_tile.inc"
}
#pragma GCC pop_options
#endif

template <typename T>
struct Level {
    const char* name;
    void (*add_panel)(const Unit* x, int64_t step, int64_t rows, const Unit* weight, int64_t units, float* sums);
    void (*write_rows)(const float* sums, const T* bias, int64_t rows, int64_t count, int64_t step, T* out);
};

std::vector<Level<float>> find_levels(float) {
    std::vector<Level<float>> levels;
#ifdef THYME_HAS_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v3")) levels.push_back({"x86-64-v3", v3::add_panel, v3::write_rows});
    if (__builtin_cpu_supports("x86-64-v4")) levels.push_back({"x86-64-v4", v4::add_panel, v4::write_rows});
#endif
    return levels;
}

std::vector<Level<Bfloat16>> find_levels(Bfloat16) {
    std::vector<Level<Bfloat16>> levels;
#ifdef THYME_HAS_X86_LEVELS
    if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16"))
        levels.push_back({"avx512-bf16", v4_bf16::add_panel, v4_bf16::write_rows});
#endif
    return levels;
}

template <typename T>
const std::vector<Level<T>>& levels() {
    static const std::vector<Level<T>> found = find_levels(T{});
    return found;
}

template <typename T>
constexpr int64_t kInputsPerUnit = sizeof(float) / sizeof(T);

}  // namespace

template <typename T>
std::vector<std::string> product_levels() {
    std::vector<std::string> names;
    for (const Level<T>& level : levels<T>()) names.push_back(level.name);
    return names;
}

template <typename T>
void pack_weight(const T* weight, int64_t outputs, int64_t inputs, T* packed, int threads) {
    constexpr int64_t kStrip = 16;  // units of each output that are read together: a cache line
    const int64_t units = inputs / kInputsPerUnit<T>, panels = (outputs + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t count = std::min(kPanel, outputs - panel * kPanel);
        char* const to = reinterpret_cast<char*>(packed + panel * kPanel * inputs);
        const char* const from = reinterpret_cast<const char*>(weight + panel * kPanel * inputs);
        if (count < kPanel) std::memset(to, 0, static_cast<size_t>(kPanel * inputs) * sizeof(T));
        for (int64_t first = 0; first < units; first += kStrip)
            for (int64_t unit = first; unit < std::min(first + kStrip, units); ++unit)
                for (int64_t i = 0; i < count; ++i)
                    std::memcpy(to + (unit * kPanel + i) * 4, from + (i * units + unit) * 4, 4);
    }
}

template <typename T>
void packed_product(const Product<T>& args, int threads, const std::string& level) {
    const auto named = [&](const Level<T>& known) { return level == "best" || known.name == level; };
    const auto found = std::find_if(levels<T>().rbegin(), levels<T>().rend(), named);
    if (found == levels<T>().rend()) throw std::invalid_argument("this processor does not run the level " + level);
    const auto* const x = reinterpret_cast<const Unit*>(args.x);
    const auto* const weight = reinterpret_cast<const Unit*>(args.weight);
    const int64_t units = args.inputs / kInputsPerUnit<T>, panels = (args.outputs + kPanel - 1) / kPanel;
    constexpr int64_t kWorthAThread = 1'000'000, kRowsPerRead = 16;  // multiply-adds, 10 us; as many take as long as reading a weight
    const int64_t work = std::max(args.rows, kRowsPerRead) * args.inputs * args.outputs;
    const auto useful = static_cast<int>(std::clamp<int64_t>(work / kWorthAThread, 1, std::max(threads, 1)));
    const int64_t columns = args.gates ? args.outputs / 2 : args.outputs, tasks = args.gates ? panels / 2 : panels;
#pragma omp parallel num_threads(useful) if (useful > 1)
    {
        alignas(64) float sums[kRowsAtOnce * kPanel];
        alignas(64) T gates[kRowsAtOnce * kPanel], values[kRowsAtOnce * kPanel];
        for (int64_t top = 0; top < args.rows; top += kRowsAtOnce) {
            const int64_t rows = std::min(kRowsAtOnce, args.rows - top);
            const auto multiply = [&](int64_t panel, int64_t count, int64_t step, T* out) {
                std::fill_n(sums, rows * kPanel, 0.0f);
                for (int64_t unit = 0; unit < units; unit += kUnitsAtOnce)
                    found->add_panel(x + top * units + unit, units, rows, weight + (panel * units + unit) * kPanel,
                                     std::min(kUnitsAtOnce, units - unit), sums);
                found->write_rows(sums, args.bias == nullptr ? nullptr : args.bias + panel * kPanel, rows, count, step, out);
            };
#pragma omp for schedule(static) nowait
            for (int64_t task = 0; task < tasks; ++task) {
                const int64_t column = task * kPanel;
                T* const out = args.out + top * columns + column;
                if (!args.gates) {
                    multiply(task, std::min(kPanel, columns - column), columns, out);
                    continue;
                }
                multiply(task, kPanel, kPanel, gates);
                multiply(task + tasks, kPanel, kPanel, values);
                for (int64_t row = 0; row < rows; ++row) gate_row(gates + row * kPanel, values + row * kPanel, kPanel, out + row * columns);
            }
        }
    }
}

template std::vector<std::string> product_levels<float>();
template std::vector<std::string> product_levels<Bfloat16>();
template void pack_weight(const float*, int64_t, int64_t, float*, int);
template void pack_weight(const Bfloat16*, int64_t, int64_t, Bfloat16*, int);
template void packed_product(const Product<float>&, int, const std::string&);
template void packed_product(const Product<Bfloat16>&, int, const std::string&);

}  // namespace thyme
