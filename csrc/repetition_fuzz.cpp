// Random segments against the definition of the rules, for a build under sanitizers: `repetition_fuzz SEGMENTS`.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "repetition.hpp"

using thyme::RepetitionHit;
using thyme::RepetitionLimits;
using thyme::RepetitionRule;
using Tokens = std::vector<int32_t>;
using Classes = std::vector<uint8_t>;

static bool equal_blocks(const Tokens& s, size_t a, size_t b, size_t length) {
    return std::equal(s.begin() + a, s.begin() + a + length, s.begin() + b);
}

static double count(const Tokens& block, const Classes& classes, uint8_t bits) {
    return static_cast<double>(std::count_if(block.begin(), block.end(), [&](int32_t token) {
        return ((static_cast<size_t>(token) < classes.size() ? classes[static_cast<size_t>(token)] : uint8_t{thyme::kRow}) & bits) != 0;
    }));
}

static bool is_plain(const Tokens& block, const RepetitionLimits& limits, const Classes& classes, bool in_tail) {
    const auto size = static_cast<double>(block.size());
    const double written = size - count(block, classes, thyme::kBlank);
    const double data = count(block, classes, thyme::kNumber) + count(block, classes, thyme::kMark);
    if (data > limits.max_data_share * written && count(block, classes, thyme::kAnswer) == 0 && (!in_tail || block.size() > 1)) {
        const auto is_number = [&](size_t i) { return count({block[i]}, classes, thyme::kNumber) != 0; };
        size_t numbers = 0;
        for (size_t i = 0; i < block.size(); ++i) numbers += is_number(i) && !is_number((i + block.size() - 1) % block.size());
        return in_tail && count(block, classes, thyme::kWord | thyme::kMark | thyme::kRow) == 0 && numbers >= limits.min_numbers;
    }
    const size_t distinct = std::set<int32_t>(block.begin(), block.end()).size();
    if (count(block, classes, thyme::kNumber | thyme::kMark | thyme::kRow) == 0) return true;
    return distinct >= limits.min_distinct || 2 * distinct > block.size();
}

static bool naive_tail(const Tokens& s, const RepetitionLimits& limits, const Classes& classes, RepetitionHit& hit) {
    const size_t n = s.size();
    for (size_t p = 1; p <= limits.copies.size() && 2 * p <= n; ++p) {
        bool primitive = true;
        for (size_t d = 1; d < p; ++d)
            if (p % d == 0 && equal_blocks(s, n - p, n - p + d, p - d)) primitive = false;
        size_t copies = 1;
        while ((copies + 1) * p <= n && equal_blocks(s, n - p, n - (copies + 1) * p, p)) ++copies;
        const bool plain = is_plain(Tokens(s.end() - static_cast<ptrdiff_t>(p), s.end()), limits, classes, true);
        const size_t needed = plain ? limits.copies[p - 1] : limits.structured_copies;
        const size_t tokens = plain ? limits.min_tail_tokens : limits.structured_tokens;
        if (!primitive || copies < needed || copies * p < tokens) continue;
        hit = {RepetitionRule::kTail, static_cast<uint32_t>(n - 1), static_cast<uint32_t>(n - copies * p),
               static_cast<uint32_t>(p), static_cast<uint32_t>(copies)};
        return true;
    }
    return false;
}

static bool naive_substring(const Tokens& s, const RepetitionLimits& limits, const Classes& classes, RepetitionHit& hit) {
    const size_t n = s.size(), w = limits.window;
    if (n < limits.min_tokens) return false;
    std::map<Tokens, std::vector<size_t>> starts;
    for (size_t i = 0; i + w <= n; ++i) {
        auto& known = starts[Tokens(s.begin() + i, s.begin() + i + w)];
        if (known.empty() || i >= known.back() + w) known.push_back(i);
    }
    const std::vector<size_t>* best = nullptr;
    for (const auto& [content, known] : starts) {
        if (known.size() < 2 || static_cast<double>(known.size()) * w <= limits.ratio * n) continue;
        if (!is_plain(content, limits, classes, false) &&
            (known.size() < limits.structured_copies || known.size() * w < limits.structured_tokens))
            continue;
        if (best == nullptr || known.size() > best->size() || (known.size() == best->size() && known[0] < (*best)[0]))
            best = &known;
    }
    if (best == nullptr) return false;
    hit = {RepetitionRule::kSubstring, static_cast<uint32_t>(n - 1), static_cast<uint32_t>((*best)[0]), limits.window,
           static_cast<uint32_t>(best->size())};
    return true;
}

// The scores of the near rule, by period, after all tokens of a segment.
struct NearScores {
    std::vector<int32_t> scores;

    void reset(size_t periods) { scores.assign(periods + 2, 0); }

    // Takes in the last token of s.
    void push(const Tokens& s, const RepetitionLimits& limits, const Classes& classes) {
        const auto cost = static_cast<int32_t>(limits.near_edit_cost);
        const Tokens last(s.end() - static_cast<ptrdiff_t>(std::min<size_t>(s.size(), limits.near_tokens)), s.end());
        const double written = static_cast<double>(last.size()) - count(last, classes, thyme::kBlank);
        const bool is_line = count({s.back()}, classes, thyme::kNumber) == 0 &&
                             count(last, classes, thyme::kRow) > limits.near_row_share * written;
        const size_t t = s.size() - 1;
        std::vector<int32_t> after(scores.size());
        for (size_t p = 1; p + 1 < scores.size(); ++p) {
            const bool equal = p <= t && s[t - p] == s[t];
            const int32_t edited =
                std::max({scores[p - 1], scores[p], scores[p + 1]}) - (is_line ? static_cast<int32_t>(limits.near_line_cost) : cost);
            after[p] = std::max(equal ? scores[p] + 1 : 0, edited > cost / 2 ? edited : 0);
        }
        scores = after;
    }
};

static bool naive_near(const Tokens& s, const std::vector<int32_t>& scores, const RepetitionLimits& limits, const Classes& classes,
                       RepetitionHit& hit) {
    const size_t n = s.size(), periods = scores.size() - 2;
    if (limits.near_tokens == 0) return false;
    for (size_t p = 1; p <= periods; ++p) {
        const auto score = static_cast<size_t>(scores[p]);
        if (score < std::max<size_t>({limits.near_tokens, (limits.near_copies - 1) * p, limits.near_edit_cost + 1})) continue;
        if (scores[p] < std::max(scores[p - 1], scores[p + 1])) continue;
        const size_t copies = 1 + score / p;
        if (copies * p > n) return false;
        size_t equal = 0;
        while (equal + p < n && s[n - 1 - equal] == s[n - 1 - equal - p]) ++equal;
        if (equal < limits.near_edit_cost || (equal >= score && copies < limits.near_exact_copies)) return false;
        const size_t judged = std::min<size_t>(n, limits.near_tokens);
        const Tokens last(s.end() - static_cast<ptrdiff_t>(judged), s.end());
        const double written = static_cast<double>(judged) - count(last, classes, thyme::kBlank);
        if (count(last, classes, thyme::kWord) < limits.near_word_share * written) return false;
        if (count(last, classes, thyme::kMark) > limits.near_mark_share * written) return false;
        const double data = count(last, classes, thyme::kNumber) + count(last, classes, thyme::kMark);
        if (data > limits.max_data_share * written && count(last, classes, thyme::kAnswer) == 0) return false;
        const size_t distinct = std::set<int32_t>(last.begin(), last.end()).size();
        if (distinct < limits.min_distinct && 2 * distinct <= judged) return false;
        hit = {RepetitionRule::kNear, static_cast<uint32_t>(n - 1), static_cast<uint32_t>(n - copies * p),
               static_cast<uint32_t>(p), static_cast<uint32_t>(copies)};
        return true;
    }
    return false;
}

int main(int argc, char** argv) {
    const int segments = argc > 1 ? std::atoi(argv[1]) : 1000;
    std::mt19937 rng(0);
    const auto pick = [&](uint32_t low, uint32_t high) -> uint32_t { return low + static_cast<uint32_t>(rng()) % (high - low + 1); };
    int fired[3] = {0, 0, 0};
    for (int round = 0; round < segments; ++round) {
        RepetitionLimits limits{};
        limits.window = pick(1, 6), limits.ratio = pick(2, 9) / 10.0, limits.min_tokens = pick(1, 40);
        // One segment in 64 is long, with periods longer than a vector and runs longer than a span.
        const bool is_long = round % 64 == 1;
        limits.min_tail_tokens = is_long ? pick(20, 120) : pick(1, 20);
        for (uint32_t p = is_long ? pick(20, 90) : pick(1, 12); p > 0; --p) limits.copies.push_back(pick(2, is_long ? 16 : 8));
        limits.structured_copies = pick(2, 12), limits.structured_tokens = pick(1, 40);
        limits.max_data_share = pick(0, 3) / 3.0, limits.min_numbers = pick(1, 3), limits.min_distinct = pick(1, 5);
        limits.near_tokens = pick(0, 20), limits.near_copies = pick(2, 4), limits.near_exact_copies = pick(2, 7), limits.near_edit_cost = pick(1, 5);
        limits.near_line_cost = limits.near_edit_cost + pick(0, 6), limits.near_row_share = pick(0, 4) / 4.0;
        limits.near_max_period = is_long ? pick(1, 60) : pick(1, 12);
        if (is_long) limits.structured_tokens = pick(100, 300), limits.near_tokens *= pick(1, 8);
        limits.near_word_share = pick(0, 2) / 4.0, limits.near_mark_share = pick(0, 3) / 3.0;
        Classes classes;
        for (uint32_t i = pick(0, 4); i > 0; --i) classes.push_back(static_cast<uint8_t>(pick(0, 63)));
        // One detector in four collides on nearly every hash.
        const bool collide = round % 4 == 0;
        auto exact = std::make_unique<thyme::RepetitionDetector<61>>(limits, classes, 2);
        auto colliding = std::make_unique<thyme::RepetitionDetector<3>>(limits, classes, 2);
        const auto with = [&](auto&& action) { return collide ? action(*colliding) : action(*exact); };
        int32_t slot = static_cast<int32_t>(with([](auto& d) { return d.open(); }));
        Tokens s, block;
        for (uint32_t i = pick(1, 8); i > 0; --i) block.push_back(static_cast<int32_t>(pick(0, 2)));
        if (is_long) {  // rows of equal cells
            const Tokens cell = block;
            for (uint32_t i = pick(0, 20); i > 0; --i) block.insert(block.end(), cell.begin(), cell.end());
            block.push_back(static_cast<int32_t>(pick(0, 3)));
        }
        const int edits = is_long ? 1000 / static_cast<int>(pick(1, 60)) : 12;
        RepetitionHit want{};
        bool hit = false;
        NearScores near;
        const size_t near_periods = std::min<size_t>(limits.copies.size(), limits.near_max_period);
        near.reset(near_periods);
        for (int i = 0, at = 0; i < (is_long ? 500 : 90); ++i) {
            const uint32_t event = pick(0, is_long ? 999 : 99);
            if (event == 0) {
                with([&](auto& d) { return d.restart(slot), 0; });
                s.clear();
                near.reset(near_periods);
                hit = false;
            } else if (event == 1) {
                const int32_t child = static_cast<int32_t>(with([&](auto& d) { return d.fork(slot); }));
                with([&](auto& d) { return d.close(slot), 0; });
                slot = child;
            } else if (event < 5) {
                ++at;  // drops a token of the block
            }
            // Changes or adds one token in `edits`.
            const int32_t token = pick(0, static_cast<uint32_t>(edits) - 1) == 0 ? static_cast<int32_t>(pick(0, 3)) : block[static_cast<size_t>(at) % block.size()];
            at += pick(0, is_long ? 499 : 19) != 0;
            if (!hit) {
                s.push_back(token);
                near.push(s, limits, classes);
                hit = naive_tail(s, limits, classes, want) || naive_substring(s, limits, classes, want) ||
                      naive_near(s, near.scores, limits, classes, want);
                if (hit) ++fired[static_cast<size_t>(want.rule)];
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
    std::printf("%d segments, %d substring hits, %d tail hits, %d near hits\n", segments, fired[0], fired[1], fired[2]);
    return 0;
}
