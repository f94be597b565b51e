// Repetition detector: the three rules of thyme/repetition.py, decided on the very token that completes them.
//
// Substring rule. The distinct windows of `window` tokens, looked up by rolling hash, hold the greedy count of their non-overlapping
// occurrences. While a count stands still, count * window > ratio * n can only turn false as n grows; so after n = min_tokens only
// the window that just ended can complete the rule, and at n = min_tokens the one with the largest count can. Most windows occur
// once, and those are not looked up: a window of w tokens holds a whole gram of g = (w + 1) / 2 tokens that begins at a multiple
// of g, so one that recurs has seen the hash of such a gram of the past within its last w - g tokens. Only then are the windows up to
// here put into the table. A hash match of windows counts only when the tokens are equal.
//
// Tail rule. For each period that the segment has been repeating with, where that began. A run that completes a rule is at least
// 2 * span - 1 tokens long and so fills one of the spans the segment is cut into; runs are searched for, and those known are followed,
// at the end of each span only. A run grows by one token at a time, so it completes the rule exactly when it reaches
// (copies - 1) * period; those that may within the next span are looked at with each token. In a table most runs are multiples of a
// shorter one, which stands for them. What the block is made of does not change while the run goes on, being the same tokens rotated.
//
// Near rule. The scores of all periods are kept only while there is one that an edit would not end, which begins as a run of equal
// tokens that is searched for in spans too, shorter ones; until then all scores are the lengths of short runs.
//
// Cost per token: max_period / (lanes * span) + O(1) expected; + the periods of long runs / span; + near_max_period / lanes while scores
// are kept; + `window` comparisons where a window recurs other than after the one it followed before. Memory: 9 bytes per token of the
// segment, and 36 more once a gram recurred; a slot keeps its memory when restarted or closed, so a warm detector does not allocate.
// Not thread-safe.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "period_scan.hpp"
#include "rolling_hash.hpp"

namespace thyme {

// What tokens are, as bits: thyme/repetition.py, TokenClass.
enum TokenClass : uint8_t { kWord = 1, kNumber = 2, kMark = 4, kRow = 8, kBlank = 16, kAnswer = 32 };

struct RepetitionLimits {
    uint32_t window;
    double ratio;
    uint32_t min_tokens;
    uint32_t min_tail_tokens;
    std::vector<uint32_t> copies;  // copies[p - 1] of period p; its size is the largest period
    uint32_t structured_copies;
    uint32_t structured_tokens;
    double max_data_share;
    uint32_t min_numbers;
    uint32_t min_distinct;
    uint32_t near_tokens;  // 0 where the near rule is off
    uint32_t near_copies;
    uint32_t near_max_period;
    uint32_t near_edit_cost;
    uint32_t near_line_cost;  // no less than near_edit_cost
    double near_row_share;
    double near_word_share;
    double near_mark_share;
};

enum class RepetitionRule : uint8_t { kSubstring, kTail, kNear };

struct RepetitionHit {
    RepetitionRule rule;
    uint32_t index, start, period, copies;
};

template <int HashBits>
class RepetitionDetector {
  public:
    // classes[t] is the class of token t; tokens beyond count as kRow.
    RepetitionDetector(const RepetitionLimits& limits, std::vector<uint8_t> classes, uint32_t capacity)
        : limits_(limits),
          classes_(std::move(classes)),
          periods_(static_cast<uint32_t>(limits.copies.size())),
          near_periods_(std::min(limits.near_max_period, periods_)),
          margin_(std::max(limits.window, periods_) + kDepth),
          gram_((limits.window + 1) / 2),
          near_span_(limits.near_edit_cost / 2 + 1),
          window_hash_(limits.window),
          gram_hash_(gram_),
          slots_(capacity) {
        for (uint32_t period = 1; period <= periods_; ++period) {
            plain_target_.push_back(tail_target(period, limits.copies[period - 1], limits.min_tail_tokens));
            structured_target_.push_back(tail_target(period, limits.structured_copies, limits.structured_tokens));
        }
        const uint32_t least = std::min(*std::min_element(plain_target_.begin(), plain_target_.end()),
                                  *std::min_element(structured_target_.begin(), structured_target_.end()));
        span_ = (least + 1) / 2;
        if (limits.near_tokens > 0)
            for (uint32_t period = near_periods_; period > 0; --period)
                near_target_.push_back(static_cast<int16_t>(
                    std::min<uint32_t>(std::max({limits.near_tokens, (limits.near_copies - 1) * period, limits.near_edit_cost + 1}), kMostScore + 1)));
        if (!near_target_.empty()) least_near_target_ = *std::min_element(near_target_.begin(), near_target_.end());
        for (uint32_t slot = capacity; slot-- > 0;) free_.push_back(slot);
    }

    uint32_t open() {
        const uint32_t slot = take();
        reset(slot);
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

    void restart(int64_t slot) {
        at(slot);
        reset(static_cast<uint32_t>(slot));
    }

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
        uint32_t next;  // 1 + index of the window that last followed it, 0 where none did
        bool is_plain;  // known from the second occurrence on
    };

    // All tokens of the segment from `start` on equal the one `period` before, as far as was looked.
    struct Run {
        uint32_t period, start;
    };

    // A run that may reach a target before the span ends, at the length `due`.
    struct DueRun {
        uint32_t period, start, due;
    };

    // Classes of tokens, counted.
    struct Mix {
        uint32_t words = 0, numbers = 0, marks = 0, rows = 0, blank = 0, answers = 0;

        void add(uint8_t token_class, uint32_t sign = 1) {
            words += sign * (token_class & kWord);
            numbers += sign * (token_class / kNumber & 1);
            marks += sign * (token_class / kMark & 1);
            rows += sign * (token_class / kRow & 1);
            blank += sign * (token_class / kBlank & 1);
            answers += sign * (token_class / kAnswer & 1);
        }
    };

    struct Slot {
        bool is_open = false;
        bool is_hit = false;
        bool is_scored = false;     // runs and scores of the near rule are kept
        uint32_t in_span = 0;       // tokens of the current span so far
        uint32_t in_near_span = 0;  // and of the near rule's
        uint32_t looked = 0;        // length of the segment at the end of the last span
        RepetitionHit hit{};
        std::vector<int32_t> tokens;    // margin_ times -1, then the segment
        std::vector<uint16_t> highs;    // halves of each of them, after a bijection that spreads ids over the first
        std::vector<uint16_t> lows;
        std::vector<uint8_t> classes;   // of the segment's tokens
        Mix lately;                     // of the last near_tokens of them
        std::vector<Run> runs;          // ascending periods, as of the end of the last span
        std::vector<DueRun> due_runs;   // ascending periods
        std::vector<int16_t> scores;    // room to move down, 0, scores by lane, 0
        size_t first_score = 0;         // where the scores begin now
        uint64_t gram = 0;              // hash of the last gram_ tokens
        uint32_t gram_seen = 0;         // length of the segment when it last ended in a known gram or window, 0 for never
        uint32_t num_grams = 0;
        std::vector<uint32_t> grams;    // open addressing, 0 where empty; a power of two long
        uint64_t hash = 0;              // of the last `window` of the first num_hashed tokens
        uint32_t num_hashed = 0;
        uint32_t last_window = 0;       // 1 + index of the window that ended with the last token, 0 where it was not counted
        Window best[2]{};               // largest count of structured and plain windows; of equal ones the earliest
        std::vector<Window> windows;
        std::vector<uint32_t> table;  // open addressing by tag: 1 + index into windows, 0 where empty; a power of two long
    };

    static constexpr size_t kImplying = 4;  // runs that others are compared with: more would cost more than they save
    static constexpr uint32_t kDepth = 3;  // tokens compared at once when periods are searched for
    static constexpr size_t kRoom = 64;      // tokens for which scores move down before they are moved back
    static constexpr size_t kSmallestGrams = 64;
    static constexpr size_t kSmallestTable = 256;

    static uint32_t tail_target(uint32_t period, uint32_t copies, uint32_t tokens) {
        return (std::max(copies, (tokens + period - 1) / period) - 1) * period;
    }

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

    void reset(uint32_t slot) {
        Slot& state = slots_[slot];
        state.is_open = true;
        state.is_hit = false;
        state.is_scored = false;
        state.in_span = slot % span_;  // slots take turns, so that no step searches for all
        state.in_near_span = slot % near_span_;
        state.looked = 0;
        state.tokens.assign(margin_, -1);
        state.highs.assign(margin_, high_of(-1));
        state.lows.assign(margin_, low_of(-1));
        state.classes.clear();
        state.lately = {};
        state.runs.clear();
        state.due_runs.clear();
        state.gram = 0;
        state.gram_seen = 0;
        state.num_grams = 0;
        state.grams.assign(kSmallestGrams, 0);
        state.hash = 0;
        state.num_hashed = 0;
        state.last_window = 0;
        state.best[0] = state.best[1] = {};
        state.windows.clear();
        state.table.clear();
    }

    void prefetch(const Slot& state) const {
        const size_t end = state.tokens.size();
        __builtin_prefetch(state.tokens.data() + end, 1);
        __builtin_prefetch(state.highs.data() + end, 1);
        __builtin_prefetch(state.lows.data() + end, 1);
        __builtin_prefetch(state.classes.data() + end - margin_, 1);
        __builtin_prefetch(state.tokens.data() + end - gram_);
        const uint32_t searched = state.in_span + 1 >= span_ ? periods_ : near_target_.empty() ? 0 : near_periods_;
        if (searched == periods_ || state.is_scored || state.in_near_span + 1 >= near_span_)
            for (uint32_t i = 0; i < searched; i += 32) __builtin_prefetch(state.highs.data() + end - searched + i);
        if (!state.is_scored) return;
        for (uint32_t i = 0; i < near_periods_; i += 32) {
            __builtin_prefetch(state.lows.data() + end - near_periods_ + i);
            __builtin_prefetch(state.scores.data() + state.first_score + i, 1);
        }
    }

    void advance(Slot& state, int32_t token) {
        const size_t end = state.tokens.size();
        state.gram = gram_hash_.roll(state.gram, token, state.tokens[end - gram_]);
        // The lookup misses the cache in a large batch; it arrives while the runs advance.
        __builtin_prefetch(&state.grams[tag_of(state.gram) & (state.grams.size() - 1)]);
        state.tokens.push_back(token);
        state.highs.push_back(high_of(token));
        state.lows.push_back(low_of(token));
        state.classes.push_back(static_cast<size_t>(token) < classes_.size() ? classes_[token] : static_cast<uint8_t>(kRow));
        const auto length = static_cast<uint32_t>(state.classes.size());
        const bool is_due = advance_runs(state, length);
        const bool is_near = !near_target_.empty() && advance_near(state, length);
        if (is_due && check_tail(state, length)) return;
        if (check_substring(state, length)) return;
        if (is_near) check_near(state, length);
    }

    // ---- runs ----

    static uint32_t spread(int32_t token) { return static_cast<uint32_t>(token) * 0x9e3779b1u; }  // odd: a bijection
    static uint16_t high_of(int32_t token) { return static_cast<uint16_t>(spread(token) >> 16); }
    static uint16_t low_of(int32_t token) { return static_cast<uint16_t>(spread(token)); }

    // Whether some run is due.
    bool advance_runs(Slot& state, uint32_t length) {
        bool is_due = false;
        if (!state.due_runs.empty()) {
            const int32_t* now = state.tokens.data() + state.tokens.size() - 1;
            size_t kept = 0;
            for (const DueRun run : state.due_runs) {
                state.due_runs[kept] = run;  // stays if it is not overwritten: no branch to mispredict
                kept += now[-static_cast<ptrdiff_t>(run.period)] == *now;
                is_due |= run.due == length;
            }
            state.due_runs.resize(kept);
        }
        if (++state.in_span < span_) return is_due;
        state.in_span = 0;
        find_runs(state, length);
        return std::any_of(state.due_runs.begin(), state.due_runs.end(), [length](const DueRun& run) { return run.due == length; });
    }

    // The length at which a run that is `run` long or longer reaches the next target.
    uint32_t next_due(uint32_t period, uint32_t start, uint32_t run) const {
        uint32_t due = std::numeric_limits<uint32_t>::max();
        for (const uint32_t target : {plain_target_[period - 1], structured_target_[period - 1]})
            if (target >= run) due = std::min(due, start + target);
        return due;
    }
    // All runs of at least span_ tokens, except those that a shorter one stands for, and which of them may become due in the next span.
    void find_runs(Slot& state, uint32_t length) {
        found_.clear();
        const int32_t* segment = state.tokens.data() + margin_;
        const int32_t* unseen = segment + state.looked;
        size_t known = 0;
        // Passes on the known runs of periods up to `period` that have gone on. Whether one of that very period is known.
        const auto pass_known = [&](uint32_t period) {
            bool is_known = false;
            for (; known < state.runs.size() && state.runs[known].period <= period; ++known) {
                const Run run = state.runs[known];
                if (!std::equal(unseen, segment + length, unseen - run.period)) continue;
                is_known = run.period == period;
                if (!is_implied(run.period, length)) found_.push_back(run);
            }
            return is_known;
        };
        const uint32_t depth = std::min(span_, kDepth);
        const uint16_t* last = state.highs.data() + state.highs.size() - depth;
        // From the smallest period on: the lanes from the last one down, in pieces that repeating_groups takes.
        for (uint32_t end = periods_; end > 0;) {
            const uint32_t begin = end > 64 * kGroup ? end - 64 * kGroup : 0;
            uint64_t groups = repeating_groups(last - periods_ + begin, last, depth, end - begin);
            while (groups != 0) {
                const int group = 63 - __builtin_clzll(groups);
                groups ^= uint64_t{1} << group;
                const uint32_t first = begin + static_cast<uint32_t>(group) * kGroup;
                for (uint32_t lane = std::min<uint32_t>(first + kGroup, end); lane-- > first;) {
                    const uint16_t* at = last - periods_ + lane;
                    if (at[0] != last[0] || at[depth - 1] != last[depth - 1]) continue;
                    const uint32_t period = periods_ - lane;
                    if (pass_known(period) || is_implied(period, length)) continue;
                    const uint32_t run = run_of(state, period);
                    if (run >= span_) found_.push_back({period, length - run});
                }
            }
            end = begin;
        }
        pass_known(periods_);
        state.looked = length;
        state.runs.assign(found_.begin(), found_.end());
        state.due_runs.clear();
        for (const auto& [period, start] : state.runs) {
            const uint32_t due = next_due(period, start, length - start);
            if (due <= length + span_) state.due_runs.push_back({period, start, due});
        }
    }

    // Whether one of the shortest periods found stands for this multiple of it: where the last `period` tokens have that period too,
    // both runs end with the same token, and until then they are a power of a shorter block, of which no rule speaks.
    bool is_implied(uint32_t period, uint32_t length) const {
        for (size_t i = 0; i < std::min(found_.size(), kImplying); ++i) {
            const auto& [shorter, start] = found_[i];
            if (period % shorter == 0 && length - start + shorter >= period) return true;
        }
        return false;
    }

    // How many of the latest tokens equal the one `period` before.
    uint32_t run_of(const Slot& state, uint32_t period) const {
        const int32_t* now = state.tokens.data() + state.tokens.size() - 1;
        const int32_t* past = now - period;
        uint32_t run = 0;
        while (*past >= 0 && *past == *now) ++run, --past, --now;
        return run;
    }

    // ---- what a block is made of ----

    Mix mix_of(const Slot& state, uint32_t start, uint32_t size) const {
        Mix mix;
        for (uint32_t i = start; i < start + size; ++i) mix.add(state.classes[i]);
        return mix;
    }

    bool is_data(const Mix& mix, uint32_t size) const {
        return mix.answers == 0 && mix.numbers + mix.marks > limits_.max_data_share * (size - mix.blank);
    }

    // Whether the tokens of the segment from `start` on, of which `mix` tells, look like rows of a table.
    bool is_table(const Slot& state, const Mix& mix, uint32_t start, uint32_t size) const {
        return mix.numbers + mix.marks + mix.rows > 0 && !has_distinct(state.tokens.data() + margin_ + start, size);
    }

    bool is_plain_window(const Slot& state, uint32_t start) const {
        const Mix mix = mix_of(state, start, limits_.window);
        return !is_data(mix, limits_.window) && !is_table(state, mix, start, limits_.window);
    }

    bool is_plain_tail(const Slot& state, uint32_t start, uint32_t size) const {
        const Mix mix = mix_of(state, start, size);
        if (size == 1 || !is_data(mix, size)) return !is_table(state, mix, start, size);
        if (mix.words + mix.marks + mix.rows > 0) return false;
        const uint8_t* classes = state.classes.data() + start;
        uint32_t begun = 0;  // around the corner: the block stands for its copies
        for (uint32_t i = 0; i < size; ++i) begun += (classes[i] & ~classes[i > 0 ? i - 1 : size - 1] & kNumber) != 0;
        return begun >= limits_.min_numbers;
    }

    // Whether the last near_tokens tokens hold words and different tokens enough, and little data.
    bool is_prose(const Slot& state, uint32_t length) const {
        const uint32_t size = std::min(length, limits_.near_tokens);
        const Mix& mix = state.lately;
        const uint32_t written = size - mix.blank;
        if (mix.words < limits_.near_word_share * written || mix.marks > limits_.near_mark_share * written) return false;
        return !is_data(mix, size) && has_distinct(state.tokens.data() + margin_ + length - size, size);
    }

    bool has_distinct(const int32_t* tokens, uint32_t size) const {
        int32_t seen[kMostDistinct];
        uint32_t known = 0;
        const uint32_t wanted = std::min(size / 2 + 1, limits_.min_distinct);
        for (uint32_t i = 0; i < size && known < wanted; ++i)
            if (std::find(seen, seen + known, tokens[i]) == seen + known) seen[known++] = tokens[i];
        return known >= wanted;
    }

    // ---- tail ----

    bool check_tail(Slot& state, uint32_t length) {
        for (auto& [period, start, due] : state.due_runs) {
            if (due != length) continue;
            const uint32_t run = length - start;
            due = next_due(period, start, run + 1);
            const bool for_plain = run == plain_target_[period - 1], for_structured = run == structured_target_[period - 1];
            if (!(for_plain || for_structured) || !is_primitive(state, period)) continue;
            if (!(for_plain && for_structured) && is_plain_tail(state, length - period, period) != for_plain) continue;
            const uint32_t tail = run + period;
            return report(state, {RepetitionRule::kTail, length - 1, length - tail, period, tail / period});
        }
        return false;
    }

    // Whether the last `period` tokens are no power of a shorter block. A shorter block's length divides the period, and so
    // does period / prime for one of the primes of the period.
    bool is_primitive(const Slot& state, uint32_t period) const {
        const int32_t* block = state.tokens.data() + state.tokens.size() - period;
        uint32_t rest = period;
        for (uint32_t prime = 2; rest > 1; ++prime) {
            if (prime * prime > rest) prime = rest;
            if (rest % prime != 0) continue;
            while (rest % prime == 0) rest /= prime;
            const uint32_t shorter = period / prime;
            if (std::equal(block, block + (period - shorter), block + shorter)) return false;
        }
        return true;
    }

    // ---- substring ----

    static uint32_t tag_of(uint64_t hash) { return static_cast<uint32_t>((hash * 0x9e3779b97f4a7c15u) >> 32) | 1u; }

    // Whether the window that just ended may have occurred before. Keeps the gram that ended if it began at a multiple of its length.
    bool look_up_gram(Slot& state, uint32_t length) const {
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

    static void grow_grams(Slot& state) {
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

    bool check_substring(Slot& state, uint32_t length) const {
        if (length < gram_) return false;
        const bool is_followed = state.num_hashed + 1 == length && follower(state) != 0;
        if (is_followed) state.gram_seen = length;
        const bool may_recur = (is_followed && length % gram_ != 0) || (look_up_gram(state, length) && length >= limits_.window);
        const Window current = may_recur ? count_windows(state, length) : Window{};
        if (length < limits_.min_tokens) return false;
        if (length > limits_.min_tokens) return check_window(state, current, length);
        const Window* first = &state.best[0];
        const Window* second = &state.best[1];
        if (second->count > first->count || (second->count == first->count && second->first < first->first)) std::swap(first, second);
        return check_window(state, *first, length) || check_window(state, *second, length);
    }

    // Counts the windows that were not counted yet. Returns the last one, which has just ended.
    Window count_windows(Slot& state, uint32_t length) const {
        const int32_t* segment = state.tokens.data() + margin_;
        Window last{};
        for (uint32_t& done = state.num_hashed; done < length;) {
            state.hash = window_hash_.roll(state.hash, segment[done], segment[static_cast<ptrdiff_t>(done) - limits_.window]);
            const uint32_t followed = follower(state);
            if (++done >= limits_.window) last = count_window(state, done - limits_.window, followed);
        }
        return last;
    }

    bool check_window(Slot& state, const Window& candidate, uint32_t length) const {
        const uint64_t covered = uint64_t{candidate.count} * limits_.window;
        if (candidate.count < 2 || static_cast<double>(covered) <= limits_.ratio * length) return false;
        if (!candidate.is_plain && (candidate.count < limits_.structured_copies || covered < limits_.structured_tokens)) return false;
        return report(state, {RepetitionRule::kSubstring, length - 1, candidate.first, limits_.window, candidate.count});
    }

    // The known window, as 1 + index, that the first num_hashed + 1 tokens end in, if it has followed the one before already; else 0.
    // What has followed shares all but its last token with what follows now.
    uint32_t follower(const Slot& state) const {
        if (state.last_window == 0) return 0;
        const uint32_t next = state.windows[state.last_window - 1].next;
        if (next == 0) return 0;
        const int32_t* segment = state.tokens.data() + margin_;
        return segment[state.windows[next - 1].first + limits_.window - 1] == segment[state.num_hashed] ? next : 0;
    }

    // Counts the window that starts at `start`, the latest of those counted.
    Window count_window(Slot& state, uint32_t start, uint32_t followed) const {
        const uint32_t index = followed != 0 ? followed : find_window(state, start);
        if (state.last_window != 0) state.windows[state.last_window - 1].next = index;
        state.last_window = index;
        Window& known = state.windows[index - 1];
        if (start - known.latest >= limits_.window) {
            known.latest = start;
            if (++known.count == 2) known.is_plain = is_plain_window(state, start);
            Window& best = state.best[known.is_plain];
            if (known.count > best.count || (known.count == best.count && known.first < best.first)) best = known;
        }
        return known;
    }

    // The window that starts at `start`, as 1 + index; a new one where it is not known.
    uint32_t find_window(Slot& state, uint32_t start) const {
        if (state.table.empty()) state.table.assign(kSmallestTable, 0);
        const int32_t* segment = state.tokens.data() + margin_;
        const int32_t* tokens = segment + start;
        const uint32_t tag = tag_of(state.hash);
        const size_t mask = state.table.size() - 1;
        size_t cell = (tag >> 1) & mask;
        for (; state.table[cell] != 0; cell = (cell + 1) & mask) {
            const Window& known = state.windows[state.table[cell] - 1];
            if (known.tag == tag && std::equal(tokens, tokens + limits_.window, segment + known.first)) return state.table[cell];
        }
        state.windows.push_back({tag, start, start, 1, 0, false});
        const auto index = static_cast<uint32_t>(state.windows.size());
        state.table[cell] = index;
        if (2 * state.windows.size() > state.table.size()) grow(state);
        return index;
    }

    static void grow(Slot& state) {
        const size_t size = 2 * state.table.size();
        state.table.assign(size, 0);
        for (size_t i = 0; i < state.windows.size(); ++i) {
            size_t cell = (state.windows[i].tag >> 1) & (size - 1);
            while (state.table[cell] != 0) cell = (cell + 1) & (size - 1);
            state.table[cell] = static_cast<uint32_t>(i + 1);
        }
    }

    // ---- near ----

    // Whether some score has reached its target, in prose.
    bool advance_near(Slot& state, uint32_t length) const {
        state.lately.add(state.classes[length - 1]);
        if (length > limits_.near_tokens) state.lately.add(state.classes[length - 1 - limits_.near_tokens], -1u);
        const bool ends_span = ++state.in_near_span >= near_span_;
        if (ends_span) state.in_near_span = 0;
        bool is_reached = false;
        if (state.is_scored) {
            const uint32_t written = std::min(length, limits_.near_tokens) - state.lately.blank;
            const bool is_line = (state.classes[length - 1] & kNumber) == 0 && state.lately.rows > limits_.near_row_share * written;
            is_reached = score(state, 0, is_line ? limits_.near_line_cost : limits_.near_edit_cost);
        } else if (ends_span && has_near_run(state)) {
            state.scores.assign(kRoom + near_periods_ + 2, 0);
            state.first_score = kRoom + 1;
            // All scores are lengths of runs, which were shorter than near_span_ at the end of the last span: any edit ends them.
            for (uint32_t age = std::min(2 * near_span_ - 1, length); age-- > 0;) is_reached = score(state, age, limits_.near_edit_cost);
        }
        return is_reached && is_prose(state, length) &&
               is_any_reached(state.scores.data() + state.first_score, near_target_.data(), near_periods_);
    }

    // Takes in the token that came `age` tokens ago. Whether some score has reached the smallest target.
    bool score(Slot& state, uint32_t age, uint32_t edit_cost) const {
        const uint16_t* high = state.highs.data() + state.highs.size() - 1 - age;
        const uint16_t* low = state.lows.data() + state.lows.size() - 1 - age;
        if (state.first_score == 1) {  // no room left: back to where they began
            std::move_backward(state.scores.begin(), state.scores.begin() + near_periods_ + 2, state.scores.end());
            state.first_score = kRoom + 1;
        }
        --state.first_score;
        state.scores[state.first_score - 1] = 0;
        const int16_t most =
            advance_scores(high - near_periods_, low - near_periods_, *high, *low, state.scores.data() + state.first_score,
                           static_cast<int16_t>(edit_cost), static_cast<int16_t>(near_span_), near_periods_);
        state.is_scored = most >= static_cast<int16_t>(near_span_);
        return most >= least_near_target_;
    }

    // Whether the segment has repeated itself for the last near_span_ tokens, or seems to.
    bool has_near_run(const Slot& state) const {
        const uint32_t depth = std::min(near_span_, kDepth);
        const uint16_t* last = state.highs.data() + state.highs.size() - depth;
        for (uint32_t begin = 0; begin < near_periods_; begin += 64 * kGroup)
            if (repeating_groups(last - near_periods_ + begin, last, depth, std::min<size_t>(near_periods_ - begin, 64 * kGroup)) != 0) return true;
        return false;
    }

    bool check_near(Slot& state, uint32_t length) const {
        const int16_t* scores = state.scores.data() + state.first_score;
        auto lane = static_cast<ptrdiff_t>(near_periods_) - 1;
        while (lane >= 0 && (scores[lane] < near_target_[lane] || scores[lane] < std::max(scores[lane - 1], scores[lane + 1]))) --lane;
        if (lane < 0) return false;
        const uint32_t period = near_periods_ - static_cast<uint32_t>(lane);
        const auto copies = 1 + static_cast<uint32_t>(scores[lane]) / period;
        if (copies * period > length) return false;
        return report(state, {RepetitionRule::kNear, length - 1, length - copies * period, period, copies});
    }

    static bool report(Slot& state, const RepetitionHit& hit) {
        state.hit = hit;
        state.is_hit = true;
        return true;
    }

  public:
    static constexpr uint32_t kMostDistinct = 64;  // of limits.min_distinct

  private:
    RepetitionLimits limits_;
    std::vector<uint8_t> classes_;
    uint32_t periods_;
    uint32_t near_periods_;
    uint32_t margin_;
    uint32_t gram_;
    uint32_t near_span_;  // also the least that is left of a score by an edit
    uint32_t span_;
    RollingHash<HashBits> window_hash_;
    RollingHash<HashBits> gram_hash_;
    std::vector<uint32_t> plain_target_, structured_target_;  // [p - 1]: run at which the period p completes the rule
    std::vector<int16_t> near_target_;                        // of period near_periods_ - i; empty where the rule is off
    int16_t least_near_target_ = 0;
    std::vector<Slot> slots_;
    std::vector<uint32_t> free_;
    std::vector<Run> found_;  // of find_runs, here so that its memory stays
};

}  // namespace thyme
