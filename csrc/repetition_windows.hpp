// Substring rule of the repetition detector (repetition.hpp): the windows that a segment has held, counted.
//
// The distinct windows of `window` tokens, looked up by rolling hash, hold the greedy count of their non-overlapping occurrences. While
// a count stands still, count * window > ratio * n can only turn false as n grows; so after n = min_tokens only the window that just
// ended can complete the rule, and at n = min_tokens the one with the largest count can. Most windows occur once, and those are not
// looked up: a window of w tokens holds a whole gram of g = (w + 1) / 2 tokens that begins at a multiple of g, so one that recurs has
// seen the hash of such a gram of the past within its last w - g tokens. Only then are the windows up to here put into the table. A hash
// match of windows counts only when the tokens are equal.
//
// Cost per token: O(1) expected; + `window` comparisons where a window recurs other than after the one it followed before.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "repetition_segment.hpp"
#include "rolling_hash.hpp"

namespace thyme {

// A distinct window of the segment: where it first began, where its latest counted occurrence began, how many there are.
struct Window {
    uint32_t tag, first, latest, count;
    uint32_t next;  // 1 + index of the window that last followed it, 0 where none did
    bool is_plain;  // known from the second occurrence on
};

// What is known of one segment.
struct WindowState {
    uint64_t gram = 0;            // hash of the last tokens, as many as a gram has
    uint32_t gram_seen = 0;       // length of the segment when it last ended in a known gram or window, 0 for never
    uint32_t num_grams = 0;
    std::vector<uint32_t> grams;  // open addressing, 0 where empty; a power of two long
    uint64_t hash = 0;            // of the last `window` of the first num_hashed tokens
    uint32_t num_hashed = 0;
    uint32_t last_window = 0;     // 1 + index of the window that ended with the last token, 0 where it was not counted
    Window best[2]{};             // largest count of structured and plain windows; of equal ones the earliest
    std::vector<Window> windows;
    std::vector<uint32_t> table;  // open addressing by tag: 1 + index into windows, 0 where empty; a power of two long

    void reset() {
        gram = 0;
        gram_seen = 0;
        num_grams = 0;
        grams.assign(kSmallestGrams, 0);
        hash = 0;
        num_hashed = 0;
        last_window = 0;
        best[0] = best[1] = {};
        windows.clear();
        table.clear();
    }

  private:
    static constexpr size_t kSmallestGrams = 64;
};

template <int HashBits>
class WindowCounter {
  public:
    WindowCounter(const RepetitionLimits& limits, const BlockKinds& kinds)
        : limits_(limits), kinds_(kinds), gram_((limits.window + 1) / 2), window_hash_(limits.window), gram_hash_(gram_) {}

    uint32_t gram() const { return gram_; }

    // Takes in the token that the segment ends with next.
    void roll(const Segment& segment, WindowState& state, int32_t token) const {
        state.gram = gram_hash_.roll(state.gram, token, *(segment.end() - gram_));
        // The lookup misses the cache in a large batch; it arrives while the runs advance.
        __builtin_prefetch(&state.grams[tag_of(state.gram) & (state.grams.size() - 1)]);
    }

    // Whether the segment, whose last token was taken in, completes the rule.
    bool check(const Segment& segment, WindowState& state, RepetitionHit& hit) const {
        const uint32_t length = segment.length();
        if (length < gram_) return false;
        const bool is_followed = state.num_hashed + 1 == length && follower(segment, state) != 0;
        if (is_followed) state.gram_seen = length;
        const bool may_recur = (is_followed && length % gram_ != 0) || (look_up_gram(state, length) && length >= limits_.window);
        const Window current = may_recur ? count_windows(segment, state) : Window{};
        if (length < limits_.min_tokens) return false;
        if (length > limits_.min_tokens) return completes(current, length, hit);
        const Window* first = &state.best[0];
        const Window* second = &state.best[1];
        if (second->count > first->count || (second->count == first->count && second->first < first->first)) std::swap(first, second);
        return completes(*first, length, hit) || completes(*second, length, hit);
    }

  private:
    static constexpr size_t kSmallestTable = 256;

    static uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>((hash * 0x9e3779b97f4a7c15u) >> 32) | 1u; }

    // Whether the window that just ended may have occurred before. Keeps the gram that ended if it began at a multiple of its length.
    bool look_up_gram(WindowState& state, uint32_t length) const {
        const uint32_t tag = tag_of(state.gram);
        const size_t mask = state.grams.size() - 1;
        size_t cell = (tag >> 1) & mask;
        while (state.grams[cell] != 0 && state.grams[cell] != tag) cell = (cell + 1) & mask;
        if (state.grams[cell] == tag) {
            state.gram_seen = length;
        } else if (length % gram_ == 0) {
            state.grams[cell] = tag;
            if (2 * ++state.num_grams > state.grams.size()) grow_grams(state);
        }
        return state.gram_seen != 0 && length - state.gram_seen <= limits_.window - gram_;
    }

    static void grow_grams(WindowState& state) {
        const std::vector<uint32_t> tags = std::move(state.grams);
        const size_t mask = 2 * tags.size() - 1;
        state.grams.assign(mask + 1, 0);
        for (const uint32_t tag : tags) {
            if (tag == 0) continue;
            size_t cell = (tag >> 1) & mask;
            while (state.grams[cell] != 0) cell = (cell + 1) & mask;
            state.grams[cell] = tag;
        }
    }

    // Counts the windows that were not counted yet. Returns the last one, which has just ended.
    Window count_windows(const Segment& segment, WindowState& state) const {
        const uint32_t length = segment.length();
        const int32_t* begin = segment.begin();
        Window last{};
        for (uint32_t& done = state.num_hashed; done < length;) {
            state.hash = window_hash_.roll(state.hash, begin[done], begin[static_cast<ptrdiff_t>(done) - limits_.window]);
            const uint32_t followed = follower(segment, state);
            if (++done >= limits_.window) last = count_window(segment, state, done - limits_.window, followed);
        }
        return last;
    }

    bool completes(const Window& candidate, uint32_t length, RepetitionHit& hit) const {
        const uint64_t covered = uint64_t{candidate.count} * limits_.window;
        if (candidate.count < 2 || static_cast<double>(covered) <= limits_.ratio * length) return false;
        if (!candidate.is_plain && (candidate.count < limits_.structured_copies || covered < limits_.structured_tokens)) return false;
        hit = {RepetitionRule::kSubstring, length - 1, candidate.first, limits_.window, candidate.count};
        return true;
    }

    // The known window, as 1 + index, that the first num_hashed + 1 tokens end in, if it has followed the one before already; else 0.
    // What has followed shares all but its last token with what follows now.
    uint32_t follower(const Segment& segment, const WindowState& state) const {
        if (state.last_window == 0) return 0;
        const uint32_t next = state.windows[state.last_window - 1].next;
        if (next == 0) return 0;
        const int32_t* begin = segment.begin();
        return begin[state.windows[next - 1].first + limits_.window - 1] == begin[state.num_hashed] ? next : 0;
    }

    // Counts the window that starts at `start`, the latest of those counted.
    Window count_window(const Segment& segment, WindowState& state, uint32_t start, uint32_t followed) const {
        const uint32_t index = followed != 0 ? followed : find_window(segment, state, start);
        if (state.last_window != 0) state.windows[state.last_window - 1].next = index;
        state.last_window = index;
        Window& known = state.windows[index - 1];
        if (start - known.latest >= limits_.window) {
            known.latest = start;
            if (++known.count == 2) known.is_plain = kinds_.is_plain_window(segment, start);
            Window& best = state.best[known.is_plain];
            if (known.count > best.count || (known.count == best.count && known.first < best.first)) best = known;
        }
        return known;
    }

    // The window that starts at `start`, as 1 + index; a new one where it is not known.
    uint32_t find_window(const Segment& segment, WindowState& state, uint32_t start) const {
        if (state.table.empty()) state.table.assign(kSmallestTable, 0);
        const int32_t* begin = segment.begin();
        const int32_t* tokens = begin + start;
        const uint32_t tag = tag_of(state.hash);
        const size_t mask = state.table.size() - 1;
        size_t cell = (tag >> 1) & mask;
        for (; state.table[cell] != 0; cell = (cell + 1) & mask) {
            const Window& known = state.windows[state.table[cell] - 1];
            if (known.tag == tag && std::equal(tokens, tokens + limits_.window, begin + known.first)) return state.table[cell];
        }
        state.windows.push_back({tag, start, start, 1, 0, false});
        const auto index = static_cast<uint32_t>(state.windows.size());
        state.table[cell] = index;
        if (2 * state.windows.size() > state.table.size()) grow(state);
        return index;
    }

    static void grow(WindowState& state) {
        const size_t size = 2 * state.table.size();
        state.table.assign(size, 0);
        for (size_t i = 0; i < state.windows.size(); ++i) {
            size_t cell = (state.windows[i].tag >> 1) & (size - 1);
            while (state.table[cell] != 0) cell = (cell + 1) & (size - 1);
            state.table[cell] = static_cast<uint32_t>(i + 1);
        }
    }

    const RepetitionLimits& limits_;
    const BlockKinds& kinds_;
    uint32_t gram_;
    RollingHash<HashBits> window_hash_;
    RollingHash<HashBits> gram_hash_;
};

}  // namespace thyme
