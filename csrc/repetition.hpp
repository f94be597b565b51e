// Repetition detector: both rules of thyme/repetition.py, decided on the very token that completes them.
//
// Substring rule. Every window of `window` tokens is looked up by rolling hash among the distinct windows of its segment,
// which hold the greedy count of non-overlapping occurrences. While a count stands still, count * window > ratio * n can only
// turn false as n grows; so after n = min_tokens only the window that just ended can complete the rule, and at n = min_tokens
// the largest count can. A hash match counts only when the tokens are equal.
//
// Tail rule. A run counter for every period. A run grows by one token at a time, so it completes the rule exactly when it
// reaches (copies - 1) * period; the block must not be a power of a shorter one, whose own period has its own limit.
//
// Cost per token: max_period / lanes + O(1) expected, + `window` comparisons where a window recurs. Memory: about 36 bytes per token
// of the segment and 8 per period; a slot keeps its memory when restarted or closed, so a warm detector does not allocate.
// Not thread-safe.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "rolling_hash.hpp"
#include "run_counters.hpp"

namespace thyme {

struct RepetitionLimits {
    uint32_t window;
    double ratio;
    uint32_t min_tokens;
    uint32_t min_tail_tokens;
    std::vector<uint32_t> copies;  // copies[p - 1] of period p; its size is the largest period
};

enum class RepetitionRule : uint8_t { kSubstring, kTail };

struct RepetitionHit {
    RepetitionRule rule;
    uint32_t index, start, period, copies;
};

template <int HashBits>
class RepetitionDetector {
  public:
    RepetitionDetector(const RepetitionLimits& limits, uint32_t capacity)
        : limits_(limits),
          periods_(static_cast<uint32_t>(limits.copies.size())),
          margin_(std::max(limits.window, periods_)),
          hash_(limits.window),
          slots_(capacity) {
        for (uint32_t i = 0; i < periods_; ++i) {
            const uint32_t period = periods_ - i;
            const uint32_t floor = (limits.min_tail_tokens + period - 1) / period;
            target_.push_back(static_cast<int32_t>((std::max(limits.copies[period - 1], floor) - 1) * period));
        }
        least_target_ = *std::min_element(target_.begin(), target_.end());
        for (uint32_t slot = capacity; slot-- > 0;) free_.push_back(slot);
    }

    uint32_t open() {
        const uint32_t slot = take();
        reset(slots_[slot]);
        return slot;
    }

    uint32_t fork(int64_t parent) {
        const Slot& source = at(parent);
        const uint32_t slot = take();
        slots_[slot] = source;
        return slot;
    }

    void close(int64_t slot) {
        at(slot).is_open = false;
        free_.push_back(static_cast<uint32_t>(slot));
    }

    void restart(int64_t slot) { reset(at(slot)); }

    // nullptr while no rule has fired.
    const RepetitionHit* hit(int64_t slot) {
        const Slot& state = at(slot);
        return state.is_hit ? &state.hit : nullptr;
    }

    // Changes nothing when any argument is bad.
    void push(const int32_t* slots, const int32_t* tokens, uint8_t* flags, size_t count) {
        for (size_t i = 0; i < count; ++i) {
            at(slots[i]);
            if (tokens[i] < 0)
                throw std::invalid_argument("tokens[" + std::to_string(i) + "] is " + std::to_string(tokens[i]) +
                                            ": a token id is not negative");
        }
        for (size_t i = 0; i < count; ++i) {
            if (i + 1 < count) prefetch(slots_[slots[i + 1]]);
            Slot& state = slots_[slots[i]];
            if (!state.is_hit) advance(state, tokens[i]);
            flags[i] = state.is_hit;
        }
    }

  private:
    // A distinct window of the segment: where it first began, where its latest counted occurrence began, how many there are.
    struct Window {
        uint32_t tag, first, latest, count;
    };

    struct Slot {
        bool is_open = false;
        bool is_hit = false;
        RepetitionHit hit{};
        uint64_t hash = 0;
        Window best{};                // largest count; of equal ones the earliest
        std::vector<int32_t> tokens;  // margin_ times -1, then the segment
        std::vector<int32_t> run;     // of period periods_ - i
        std::vector<Window> windows;
        std::vector<uint32_t> table;  // open addressing by tag: 1 + index into windows, 0 where empty; a power of two long
    };

    static constexpr size_t kSmallestTable = 256;

    uint32_t take() {
        if (free_.empty())
            throw std::invalid_argument("all " + std::to_string(slots_.size()) +
                                        " slots of the detector are open: close one or raise its capacity");
        const uint32_t slot = free_.back();
        free_.pop_back();
        return slot;
    }

    Slot& at(int64_t slot) {
        if (slot < 0 || slot >= static_cast<int64_t>(slots_.size()) || !slots_[slot].is_open)
            throw std::invalid_argument("slot " + std::to_string(slot) + " is not open in this detector of capacity " +
                                        std::to_string(slots_.size()));
        return slots_[slot];
    }

    void reset(Slot& state) {
        state.is_open = true;
        state.is_hit = false;
        state.hash = 0;
        state.best = {};
        state.tokens.assign(margin_, -1);
        state.run.assign(periods_, 0);
        state.windows.clear();
        state.table.assign(kSmallestTable, 0);
    }

    void prefetch(const Slot& state) const {
        for (uint32_t i = 0; i < periods_; i += 16) {
            __builtin_prefetch(state.run.data() + i, 1);
            __builtin_prefetch(state.tokens.data() + state.tokens.size() - periods_ + i);
        }
        __builtin_prefetch(state.windows.data() + state.windows.size(), 1);
    }

    void advance(Slot& state, int32_t token) {
        const size_t end = state.tokens.size();
        state.hash = hash_.roll(state.hash, token, state.tokens[end - limits_.window]);
        // The lookup misses the cache in a large batch; it arrives while the runs advance.
        __builtin_prefetch(&state.table[tag_of(state) & (state.table.size() - 1)]);
        const int32_t longest = advance_runs(state.tokens.data() + end - periods_, token, state.run.data(), periods_);
        state.tokens.push_back(token);
        const auto length = static_cast<uint32_t>(state.tokens.size() - margin_);
        if (longest >= least_target_ && check_tail(state, length)) return;
        if (length >= limits_.window) check_substring(state, length);
    }

    bool check_tail(Slot& state, uint32_t length) {
        for (uint32_t period = 1; period <= periods_; ++period) {
            const int32_t run = state.run[periods_ - period];
            if (run != target_[periods_ - period] || !is_primitive(state, period)) continue;
            const uint32_t tail = static_cast<uint32_t>(run) + period;
            report(state, {RepetitionRule::kTail, length - 1, length - tail, period, tail / period});
            return true;
        }
        return false;
    }

    // Whether the last `period` tokens are no power of a shorter block. A shorter block's length divides the period, and so
    // does period / prime for one of the primes of the period.
    bool is_primitive(const Slot& state, uint32_t period) const {
        uint32_t rest = period;
        for (uint32_t prime = 2; rest > 1; ++prime) {
            if (prime * prime > rest) prime = rest;
            if (rest % prime != 0) continue;
            while (rest % prime == 0) rest /= prime;
            const uint32_t shorter = period / prime;
            if (state.run[periods_ - shorter] >= static_cast<int32_t>(period - shorter)) return false;
        }
        return true;
    }

    void check_substring(Slot& state, uint32_t length) {
        const Window current = count_window(state, length - limits_.window);
        if (current.count > state.best.count || (current.count == state.best.count && current.first < state.best.first))
            state.best = current;
        if (length < limits_.min_tokens) return;
        const Window& candidate = length == limits_.min_tokens ? state.best : current;
        const double covered = static_cast<double>(candidate.count) * limits_.window;
        if (candidate.count >= 2 && covered > limits_.ratio * length)
            report(state, {RepetitionRule::kSubstring, length - 1, candidate.first, limits_.window, candidate.count});
    }

    static uint32_t tag_of(const Slot& state) { return static_cast<uint32_t>((state.hash * 0x9e3779b97f4a7c15u) >> 32); }

    // Counts the window that starts at `start`, the latest of the segment.
    Window count_window(Slot& state, uint32_t start) {
        const int32_t* segment = state.tokens.data() + margin_;
        const int32_t* tokens = segment + start;
        const uint32_t tag = tag_of(state);
        const size_t mask = state.table.size() - 1;
        size_t cell = tag & mask;
        for (; state.table[cell] != 0; cell = (cell + 1) & mask) {
            Window& known = state.windows[state.table[cell] - 1];
            if (known.tag != tag || !std::equal(tokens, tokens + limits_.window, segment + known.first)) continue;
            if (start - known.latest >= limits_.window) {
                known.latest = start;
                known.count += 1;
            }
            return known;
        }
        state.windows.push_back({tag, start, start, 1});
        state.table[cell] = static_cast<uint32_t>(state.windows.size());
        if (2 * state.windows.size() > state.table.size()) grow(state);
        return state.windows.back();
    }

    static void grow(Slot& state) {
        const size_t size = 2 * state.table.size();
        state.table.assign(size, 0);
        for (size_t i = 0; i < state.windows.size(); ++i) {
            size_t cell = state.windows[i].tag & (size - 1);
            while (state.table[cell] != 0) cell = (cell + 1) & (size - 1);
            state.table[cell] = static_cast<uint32_t>(i + 1);
        }
    }

    static void report(Slot& state, const RepetitionHit& hit) {
        state.hit = hit;
        state.is_hit = true;
    }

    RepetitionLimits limits_;
    uint32_t periods_;
    uint32_t margin_;
    RollingHash<HashBits> hash_;
    std::vector<int32_t> target_;  // run at which the period periods_ - i completes the rule
    int32_t least_target_;
    std::vector<Slot> slots_;
    std::vector<uint32_t> free_;
};

}  // namespace thyme
