// Near rule of the repetition detector (repetition.hpp): how well a segment repeats itself, edits allowed.
//
// The scores of all periods are kept only while there is one that an edit would not end, which begins as a run of equal tokens that is
// searched for in spans; until then all scores are the lengths of short runs.
//
// Cost per token: max_period / (lanes * span); + max_period / lanes while scores are kept.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "period_scan.hpp"
#include "repetition_segment.hpp"

namespace thyme {

// What is known of one segment.
struct ScoreState {
    bool is_scored = false;       // scores are kept
    uint32_t in_span = 0;         // tokens of the current span so far
    TokenMix lately;              // of the last near_tokens tokens
    std::vector<int16_t> scores;  // room to move down, 0, scores by lane, 0
    size_t first_score = 0;       // where the scores begin now

    void reset(uint32_t first_in_span) {
        is_scored = false;
        in_span = first_in_span;
        lately = {};
    }
};

class NearScores {
  public:
    NearScores(const RepetitionLimits& limits, const BlockKinds& kinds)
        : limits_(limits),
          kinds_(kinds),
          periods_(std::min(limits.near_max_period, static_cast<uint32_t>(limits.copies.size()))),
          span_(limits.near_edit_cost / 2 + 1) {
        if (limits.near_tokens == 0) return;
        for (uint32_t period = periods_; period > 0; --period)
            target_.push_back(static_cast<int16_t>(std::min<uint32_t>(
                std::max({limits.near_tokens, (limits.near_copies - 1) * period, limits.near_edit_cost + 1}), kMostScore + 1)));
        if (!target_.empty()) least_target_ = *std::min_element(target_.begin(), target_.end());
    }

    uint32_t periods() const { return periods_; }
    uint32_t span() const { return span_; }

    // Whether the next token is compared with those of all periods.
    bool searches(const ScoreState& state) const {
        return !target_.empty() && (state.is_scored || state.in_span + 1 >= span_);
    }

    // Takes in the segment's last token. Whether some score has reached its target, in prose.
    bool advance(const Segment& segment, ScoreState& state) const {
        if (target_.empty()) return false;
        const uint32_t length = segment.length();
        state.lately.add(segment.classes[length - 1]);
        if (length > limits_.near_tokens) state.lately.add(segment.classes[length - 1 - limits_.near_tokens], -1u);
        const bool ends_span = ++state.in_span >= span_;
        if (ends_span) state.in_span = 0;
        bool is_reached = false;
        if (state.is_scored) {
            const uint32_t written = std::min(length, limits_.near_tokens) - state.lately.blank;
            const bool is_line = (segment.classes[length - 1] & kNumber) == 0 && state.lately.rows > limits_.near_row_share * written;
            is_reached = score(segment, state, 0, is_line ? limits_.near_line_cost : limits_.near_edit_cost);
        } else if (ends_span && has_run(segment)) {
            state.scores.assign(kRoom + periods_ + 2, 0);
            state.first_score = kRoom + 1;
            // All scores are lengths of runs, which were shorter than span_ at the end of the last span: any edit ends them.
            for (uint32_t age = std::min(2 * span_ - 1, length); age-- > 0;) is_reached = score(segment, state, age, limits_.near_edit_cost);
        }
        return is_reached && kinds_.is_prose(segment, state.lately) &&
               is_any_reached(state.scores.data() + state.first_score, target_.data(), periods_);
    }

    // Whether a score that has reached its target stands for whole copies that go on, enough of them where no token differs.
    bool check(const Segment& segment, const ScoreState& state, RepetitionHit& hit) const {
        const uint32_t length = segment.length();
        const int16_t* scores = state.scores.data() + state.first_score;
        auto lane = static_cast<ptrdiff_t>(periods_) - 1;
        while (lane >= 0 && (scores[lane] < target_[lane] || scores[lane] < std::max(scores[lane - 1], scores[lane + 1]))) --lane;
        if (lane < 0) return false;
        const uint32_t period = periods_ - static_cast<uint32_t>(lane);
        const auto repeated = static_cast<uint32_t>(scores[lane]);
        const auto copies = 1 + repeated / period;
        if (copies * period > length) return false;
        const uint32_t equal = num_equal(segment, period, copies < limits_.near_exact_copies ? repeated : limits_.near_edit_cost);
        if (equal < limits_.near_edit_cost || (equal >= repeated && copies < limits_.near_exact_copies)) return false;
        hit = {RepetitionRule::kNear, length - 1, length - copies * period, period, copies};
        return true;
    }

  private:
    static constexpr size_t kRoom = 64;  // tokens for which scores move down before they are moved back

    // Takes in the token that came `age` tokens ago. Whether some score has reached the smallest target.
    bool score(const Segment& segment, ScoreState& state, uint32_t age, uint32_t edit_cost) const {
        const uint16_t* high = segment.highs.data() + segment.highs.size() - 1 - age;
        const uint16_t* low = segment.lows.data() + segment.lows.size() - 1 - age;
        if (state.first_score == 1) {  // no room left: back to where they began
            std::move_backward(state.scores.begin(), state.scores.begin() + periods_ + 2, state.scores.end());
            state.first_score = kRoom + 1;
        }
        --state.first_score;
        state.scores[state.first_score - 1] = 0;
        const int16_t most =
            advance_scores(high - periods_, low - periods_, *high, *low, state.scores.data() + state.first_score,
                           static_cast<int16_t>(edit_cost), static_cast<int16_t>(span_), periods_);
        state.is_scored = most >= static_cast<int16_t>(span_);
        return most >= least_target_;
    }

    // How many of the latest tokens equal the one `period` before, as far as `most` of them.
    static uint32_t num_equal(const Segment& segment, uint32_t period, uint32_t most) {
        const int32_t* now = segment.end() - 1;
        const uint32_t end = std::min(most, segment.length() - period);
        uint32_t count = 0;
        while (count < end && now[-static_cast<ptrdiff_t>(count)] == now[-static_cast<ptrdiff_t>(count + period)]) ++count;
        return count;
    }

    // Whether the segment has repeated itself for the last span_ tokens, or seems to.
    bool has_run(const Segment& segment) const {
        const uint32_t depth = std::min(span_, kDepth);
        const uint16_t* last = segment.highs.data() + segment.highs.size() - depth;
        for (uint32_t begin = 0; begin < periods_; begin += 64 * kGroup)
            if (repeating_groups(last - periods_ + begin, last, depth, std::min<size_t>(periods_ - begin, 64 * kGroup)) != 0) return true;
        return false;
    }

    const RepetitionLimits& limits_;
    const BlockKinds& kinds_;
    uint32_t periods_;
    uint32_t span_;                // also the least that is left of a score by an edit
    std::vector<int16_t> target_;  // of period periods_ - i; empty where the rule is off
    int16_t least_target_ = 0;
};

}  // namespace thyme
