// Random segments against the definition of the rules, for a build under sanitizers: `repetition_fuzz SEGMENTS`.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "repetition.hpp"

using thyme::RepetitionHit;
using thyme::RepetitionLimits;
using thyme::RepetitionRule;
using Tokens = std::vector<int32_t>;

static bool equal_blocks(const Tokens& s, size_t a, size_t b, size_t length) {
    return std::equal(s.begin() + a, s.begin() + a + length, s.begin() + b);
}

static bool naive_tail(const Tokens& s, const RepetitionLimits& limits, RepetitionHit& hit) {
    const size_t n = s.size();
    for (size_t p = 1; p <= limits.copies.size() && 2 * p <= n; ++p) {
        bool primitive = true;
        for (size_t d = 1; d < p; ++d)
            if (p % d == 0 && equal_blocks(s, n - p, n - p + d, p - d)) primitive = false;
        size_t copies = 1;
        while ((copies + 1) * p <= n && equal_blocks(s, n - p, n - (copies + 1) * p, p)) ++copies;
        if (!primitive || copies < limits.copies[p - 1] || copies * p < limits.min_tail_tokens) continue;
        hit = {RepetitionRule::kTail, static_cast<uint32_t>(n - 1), static_cast<uint32_t>(n - copies * p),
               static_cast<uint32_t>(p), static_cast<uint32_t>(copies)};
        return true;
    }
    return false;
}

static bool naive_substring(const Tokens& s, const RepetitionLimits& limits, RepetitionHit& hit) {
    const size_t n = s.size(), w = limits.window;
    if (n < limits.min_tokens) return false;
    std::map<Tokens, std::vector<size_t>> starts;
    for (size_t i = 0; i + w <= n; ++i) {
        auto& known = starts[Tokens(s.begin() + i, s.begin() + i + w)];
        if (known.empty() || i >= known.back() + w) known.push_back(i);
    }
    const std::vector<size_t>* best = nullptr;
    for (const auto& [content, known] : starts)
        if (best == nullptr || known.size() > best->size() || (known.size() == best->size() && known[0] < (*best)[0]))
            best = &known;
    if (best == nullptr || best->size() < 2 || static_cast<double>(best->size()) * w <= limits.ratio * n) return false;
    hit = {RepetitionRule::kSubstring, static_cast<uint32_t>(n - 1), static_cast<uint32_t>((*best)[0]), limits.window,
           static_cast<uint32_t>(best->size())};
    return true;
}

int main(int argc, char** argv) {
    const int segments = argc > 1 ? std::atoi(argv[1]) : 1000;
    std::mt19937 rng(0);
    const auto pick = [&](uint32_t low, uint32_t high) -> uint32_t { return low + static_cast<uint32_t>(rng()) % (high - low + 1); };
    int fired[2] = {0, 0};
    for (int round = 0; round < segments; ++round) {
        RepetitionLimits limits{pick(1, 6), pick(2, 9) / 10.0, pick(1, 40), pick(1, 20), {}};
        for (uint32_t p = pick(1, 12); p > 0; --p) limits.copies.push_back(pick(2, 8));
        // One detector in four collides on nearly every hash.
        const bool collide = round % 4 == 0;
        auto exact = std::make_unique<thyme::RepetitionDetector<61>>(limits, 2);
        auto colliding = std::make_unique<thyme::RepetitionDetector<3>>(limits, 2);
        const auto with = [&](auto&& action) { return collide ? action(*colliding) : action(*exact); };
        int32_t slot = static_cast<int32_t>(with([](auto& d) { return d.open(); }));
        Tokens s, block;
        for (uint32_t i = pick(1, 8); i > 0; --i) block.push_back(static_cast<int32_t>(pick(0, 2)));
        RepetitionHit want{};
        bool hit = false;
        for (int i = 0; i < 90; ++i) {
            const int32_t token = pick(0, 11) == 0 ? static_cast<int32_t>(pick(0, 2)) : block[i % block.size()];
            const uint32_t event = pick(0, 99);
            if (event == 0) {
                with([&](auto& d) { return d.restart(slot), 0; });
                s.clear();
                hit = false;
            } else if (event == 1) {
                const int32_t child = static_cast<int32_t>(with([&](auto& d) { return d.fork(slot); }));
                with([&](auto& d) { return d.close(slot), 0; });
                slot = child;
            }
            if (!hit) {
                s.push_back(token);
                hit = naive_tail(s, limits, want) || naive_substring(s, limits, want);
                if (hit) ++fired[want.rule == RepetitionRule::kTail];
            }
            uint8_t flag = 2;
            with([&](auto& d) { return d.push(&slot, &token, &flag, 1), 0; });
            const RepetitionHit* got = with([&](auto& d) { return d.hit(slot); });
            const bool same = hit ? got != nullptr && got->rule == want.rule && got->index == want.index &&
                                        got->start == want.start && got->period == want.period && got->copies == want.copies
                                  : got == nullptr;
            if (!same || flag != hit) {
                std::fprintf(stderr, "segment %d differs at token %d\n", round, i);
                return 1;
            }
        }
    }
    std::printf("%d segments, %d substring hits, %d tail hits\n", segments, fired[0], fired[1]);
    return 0;
}
