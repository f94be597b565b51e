// Tail rule of the repetition detector (repetition.hpp): the runs that a segment has been repeating with.
//
// For each period, where its run began. A run that completes the rule is at least 2 * span - 1 tokens long and so fills one of the
// spans the segment is cut into; runs are searched for, and those known are followed, at the end of each span only. A run grows by one
// token at a time, so it completes the rule exactly when it reaches (copies - 1) * period; those that may within the next span are
// looked at with each token. In a table most runs are multiples of a shorter one, which stands for them. What the block is made of does
// not change while the run goes on, being the same tokens rotated.
//
// Cost per token: max_period / (lanes * span) + the periods of long runs / span.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "period_scan.hpp"
#include "repetition_segment.hpp"

namespace thyme {

// All tokens of the segment from `start` on equal the one `period` before, as far as was looked.
struct Run {
    uint32_t period, start;
};

// A run that may reach a target before the span ends, at the length `due`.
struct DueRun {
    uint32_t period, start, due;
};

// What is known of one segment.
struct RunState {
    uint32_t in_span = 0;          // tokens of the current span so far
    uint32_t looked = 0;           // length of the segment at the end of the last span
    std::vector<Run> runs;         // ascending periods, as of the end of the last span
    std::vector<DueRun> due_runs;  // ascending periods

    void reset(uint32_t first_in_span) {
        in_span = first_in_span;
        looked = 0;
        runs.clear();
        due_runs.clear();
    }
};

class RunTracker {
  public:
    RunTracker(const RepetitionLimits& limits, const BlockKinds& kinds) : kinds_(kinds), periods_(static_cast<uint32_t>(limits.copies.size())) {
        for (uint32_t period = 1; period <= periods_; ++period) {
            plain_target_.push_back(tail_target(period, limits.copies[period - 1], limits.min_tail_tokens));
            structured_target_.push_back(tail_target(period, limits.structured_copies, limits.structured_tokens));
        }
        const uint32_t least = std::min(*std::min_element(plain_target_.begin(), plain_target_.end()),
                                        *std::min_element(structured_target_.begin(), structured_target_.end()));
        span_ = (least + 1) / 2;
    }

    uint32_t periods() const { return periods_; }
    uint32_t span() const { return span_; }

    // Whether the next token ends a span.
    bool ends_span(const RunState& state) const { return state.in_span + 1 >= span_; }

    // Takes in the segment's last token. Whether some run is due.
    bool advance(const Segment& segment, RunState& state) {
        const uint32_t length = segment.length();
        bool is_due = false;
        if (!state.due_runs.empty()) {
            const int32_t* now = segment.end() - 1;
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
        find_runs(segment, state);
        return std::any_of(state.due_runs.begin(), state.due_runs.end(), [length](const DueRun& run) { return run.due == length; });
    }

    // Whether a run that is due completes the rule.
    bool check(const Segment& segment, RunState& state, RepetitionHit& hit) const {
        const uint32_t length = segment.length();
        for (auto& [period, start, due] : state.due_runs) {
            if (due != length) continue;
            const uint32_t run = length - start;
            due = next_due(period, start, run + 1);
            const bool for_plain = run == plain_target_[period - 1], for_structured = run == structured_target_[period - 1];
            if (!(for_plain || for_structured) || !is_primitive(segment, period)) continue;
            if (!(for_plain && for_structured) && kinds_.is_plain_tail(segment, length - period, period) != for_plain) continue;
            const uint32_t tail = run + period;
            hit = {RepetitionRule::kTail, length - 1, length - tail, period, tail / period};
            return true;
        }
        return false;
    }

  private:
    static constexpr size_t kImplying = 4;  // runs that others are compared with: more would cost more than they save

    static uint32_t tail_target(uint32_t period, uint32_t copies, uint32_t tokens) {
        return (std::max(copies, (tokens + period - 1) / period) - 1) * period;
    }

    // The length at which a run that is `run` long or longer reaches the next target.
    uint32_t next_due(uint32_t period, uint32_t start, uint32_t run) const {
        uint32_t due = std::numeric_limits<uint32_t>::max();
        for (const uint32_t target : {plain_target_[period - 1], structured_target_[period - 1]})
            if (target >= run) due = std::min(due, start + target);
        return due;
    }

    // All runs of at least span_ tokens, except those that a shorter one stands for, and which of them may become due in the next span.
    void find_runs(const Segment& segment, RunState& state) {
        found_.clear();
        const uint32_t length = segment.length();
        const int32_t* unseen = segment.begin() + state.looked;
        size_t known = 0;
        // Passes on the known runs of periods up to `period` that have gone on. Whether one of that very period is known.
        const auto pass_known = [&](uint32_t period) {
            bool is_known = false;
            for (; known < state.runs.size() && state.runs[known].period <= period; ++known) {
                const Run run = state.runs[known];
                if (!std::equal(unseen, segment.end(), unseen - run.period)) continue;
                is_known = run.period == period;
                if (!is_implied(run.period, length)) found_.push_back(run);
            }
            return is_known;
        };
        const uint32_t depth = std::min(span_, kDepth);
        const uint16_t* last = segment.highs.data() + segment.highs.size() - depth;
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
                    const uint32_t run = run_of(segment, period);
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
    uint32_t run_of(const Segment& segment, uint32_t period) const {
        const int32_t* now = segment.end() - 1;
        const int32_t* past = now - period;
        uint32_t run = 0;
        while (*past >= 0 && *past == *now) ++run, --past, --now;
        return run;
    }

    // Whether the last `period` tokens are no power of a shorter block. A shorter block's length divides the period, and so
    // does period / prime for one of the primes of the period.
    bool is_primitive(const Segment& segment, uint32_t period) const {
        const int32_t* block = segment.end() - period;
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

    const BlockKinds& kinds_;
    uint32_t periods_;
    uint32_t span_;
    std::vector<uint32_t> plain_target_, structured_target_;  // [p - 1]: run at which the period p completes the rule
    std::vector<Run> found_;  // of find_runs, here so that its memory stays
};

}  // namespace thyme
