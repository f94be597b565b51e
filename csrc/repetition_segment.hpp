// What the rules of the repetition detector share: its limits, what a hit is, a segment of tokens, and what blocks of it are made of.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

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
    uint32_t near_exact_copies;
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

// Classes of tokens, counted.
struct TokenMix {
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

constexpr uint32_t kDepth = 3;  // tokens compared at once when periods are searched for

// The tokens since a slot was opened or restarted, behind a margin of -1 that lets every look back stay inside.
struct Segment {
    uint32_t margin = 0;
    std::vector<int32_t> tokens;  // margin times -1, then the segment
    std::vector<uint16_t> highs;  // halves of each of them, after a bijection that spreads ids over the first
    std::vector<uint16_t> lows;
    std::vector<uint8_t> classes;  // of the segment's tokens

    uint32_t length() const { return static_cast<uint32_t>(classes.size()); }
    const int32_t* begin() const { return tokens.data() + margin; }
    const int32_t* end() const { return tokens.data() + tokens.size(); }

    void reset(uint32_t with_margin) {
        margin = with_margin;
        tokens.assign(margin, -1);
        highs.assign(margin, high_of(-1));
        lows.assign(margin, low_of(-1));
        classes.clear();
    }

    void push(int32_t token, uint8_t token_class) {
        tokens.push_back(token);
        highs.push_back(high_of(token));
        lows.push_back(low_of(token));
        classes.push_back(token_class);
    }

  private:
    static uint32_t spread(int32_t token) { return static_cast<uint32_t>(token) * 0x9e3779b1u; }  // odd: a bijection
    static uint16_t high_of(int32_t token) { return static_cast<uint16_t>(spread(token) >> 16); }
    static uint16_t low_of(int32_t token) { return static_cast<uint16_t>(spread(token)); }
};

// Tells blocks that are plain text from those that repeat by their nature: data, and rows of tables.
class BlockKinds {
  public:
    static constexpr uint32_t kMostDistinct = 64;  // of limits.min_distinct

    // limits: outlive this.
    explicit BlockKinds(const RepetitionLimits& limits) : limits_(limits) {}

    bool is_plain_window(const Segment& segment, uint32_t start) const {
        const TokenMix mix = mix_of(segment, start, limits_.window);
        return !is_data(mix, limits_.window) && !is_table(segment, mix, start, limits_.window);
    }

    bool is_plain_tail(const Segment& segment, uint32_t start, uint32_t size) const {
        const TokenMix mix = mix_of(segment, start, size);
        if (size == 1 || !is_data(mix, size)) return !is_table(segment, mix, start, size);
        if (mix.words + mix.marks + mix.rows > 0) return false;
        const uint8_t* classes = segment.classes.data() + start;
        uint32_t begun = 0;  // around the corner: the block stands for its copies
        for (uint32_t i = 0; i < size; ++i) begun += (classes[i] & ~classes[i > 0 ? i - 1 : size - 1] & kNumber) != 0;
        return begun >= limits_.min_numbers;
    }

    // Whether the last near_tokens tokens, of which `mix` tells, hold words and different tokens enough, and little data.
    bool is_prose(const Segment& segment, const TokenMix& mix) const {
        const uint32_t size = std::min(segment.length(), limits_.near_tokens);
        const uint32_t written = size - mix.blank;
        if (mix.words < limits_.near_word_share * written || mix.marks > limits_.near_mark_share * written) return false;
        return !is_data(mix, size) && has_distinct(segment.end() - size, size);
    }

  private:
    static TokenMix mix_of(const Segment& segment, uint32_t start, uint32_t size) {
        TokenMix mix;
        for (uint32_t i = start; i < start + size; ++i) mix.add(segment.classes[i]);
        return mix;
    }

    bool is_data(const TokenMix& mix, uint32_t size) const {
        return mix.answers == 0 && mix.numbers + mix.marks > limits_.max_data_share * (size - mix.blank);
    }

    // Whether the tokens of the segment from `start` on, of which `mix` tells, look like rows of a table.
    bool is_table(const Segment& segment, const TokenMix& mix, uint32_t start, uint32_t size) const {
        return mix.numbers + mix.marks + mix.rows > 0 && !has_distinct(segment.begin() + start, size);
    }

    bool has_distinct(const int32_t* tokens, uint32_t size) const {
        int32_t seen[kMostDistinct];
        uint32_t known = 0;
        const uint32_t wanted = std::min(size / 2 + 1, limits_.min_distinct);
        for (uint32_t i = 0; i < size && known < wanted; ++i)
            if (std::find(seen, seen + known, tokens[i]) == seen + known) seen[known++] = tokens[i];
        return known >= wanted;
    }

    const RepetitionLimits& limits_;
};

}  // namespace thyme
