// What the forward passes over rows share: who does which row, and a token's way into the cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "pointwise.hpp"

namespace thyme {

// Threads that are worth waking, which takes a few microseconds, for so many numbers of `cost` quarters of a nanosecond each.
inline int useful_threads(int64_t numbers, int64_t cost, int threads) {
    constexpr int64_t kWorthAThread = 60'000;
    return static_cast<int>(std::clamp<int64_t>(numbers * cost / kWorthAThread, 1, std::max(threads, 1)));
}

// Calls work(row) for each row; a row is one thread's.
template <typename Work>
void for_each_row(int64_t rows, int useful, const Work& work) {
#pragma omp parallel for schedule(static) num_threads(useful) if (useful > 1)
    for (int64_t row = 0; row < rows; ++row) work(row);
}

// turn(head, cos, sin, out) turns one head.
template <typename T, typename Turn>
void turn_heads(const Rows<const T>& heads, const float* cos, const float* sin, int64_t tokens, int64_t num_heads, int64_t half, T* out,
                int threads, const Turn& turn) {
    for_each_row(tokens, useful_threads(tokens * num_heads * 2 * half, 2, threads), [&](int64_t token) {
        for (int64_t row = token * num_heads; row < (token + 1) * num_heads; ++row)
            turn(heads.at(row), cos + token * half, sin + token * half, out + row * 2 * half);
    });
}

template <typename T, typename Turn>
void turn_and_store(const NewTokens<T>& args, int threads, const Turn& turn) {
    const int64_t heads = args.queries + 2 * args.keys, width = 2 * args.half, row = args.keys * width;
    for_each_row(args.tokens, useful_threads(args.tokens * heads * width, 2, threads), [&](int64_t token) {
        const float *const cos = args.cos + token * args.half, *const sin = args.sin + token * args.half;
        const int64_t first = token * heads, slot = args.slots[token];
        for (int64_t i = 0; i < args.queries; ++i) turn(args.heads.at(first + i), cos, sin, args.q + (token * args.queries + i) * width);
        if (slot < 0) return;
        for (int64_t i = 0; i < args.keys; ++i) {
            turn(args.heads.at(first + args.queries + i), cos, sin, args.k_cache + slot * row + i * width);
            std::memcpy(args.v_cache + slot * row + i * width, args.heads.at(first + args.queries + args.keys + i),
                        static_cast<size_t>(width) * sizeof(T));
        }
    });
}

}  // namespace thyme
