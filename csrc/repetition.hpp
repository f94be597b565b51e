// Repetition detector: the three rules of thyme/repetition.py, decided on the very token that completes them.
//
// A slot holds a segment of tokens and what each rule knows of it: the windows it has held (repetition_windows.hpp, substring rule),
// the runs it repeats with (repetition_runs.hpp, tail rule), and how well it repeats with edits (repetition_scores.hpp, near rule). Memory:
// 9 bytes per token of the segment, and 36 more once a gram recurred; a slot keeps its memory when restarted or closed, so a warm
// detector does not allocate. Not thread-safe.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "repetition_runs.hpp"
#include "repetition_scores.hpp"
#include "repetition_segment.hpp"
#include "repetition_windows.hpp"

namespace thyme {

template <int HashBits>
class RepetitionDetector {
  public:
    // classes[t] is the class of token t; tokens beyond count as kRow.
    RepetitionDetector(const RepetitionLimits& limits, std::vector<uint8_t> classes, uint32_t capacity)
        : limits_(limits), classes_(std::move(classes)), kinds_(limits_), windows_(limits_, kinds_), runs_(limits_, kinds_), scores_(limits_, kinds_), slots_(capacity) {
        for (uint32_t slot = capacity; slot-- > 0;) free_.push_back(slot);
    }

    // The rules refer to the limits kept here.
    RepetitionDetector(const RepetitionDetector&) = delete;
    RepetitionDetector& operator=(const RepetitionDetector&) = delete;

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
            if (!state.is_hit) state.is_hit = advance(state, tokens[i]);
            flags[i] = state.is_hit;
        }
    }

  private:
    struct Slot {
        bool is_open = false;
        bool is_hit = false;
        RepetitionHit hit{};
        Segment segment;
        WindowState windows;
        RunState runs;
        ScoreState scores;
    };

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
        state.segment.reset(std::max(limits_.window, runs_.periods()) + kDepth);
        state.windows.reset();
        state.runs.reset(slot % runs_.span());  // slots take turns, so that no step searches for all
        state.scores.reset(slot % scores_.span());
    }

    void prefetch(const Slot& state) const {
        const Segment& segment = state.segment;
        const size_t end = segment.tokens.size();
        __builtin_prefetch(segment.tokens.data() + end, 1);
        __builtin_prefetch(segment.highs.data() + end, 1);
        __builtin_prefetch(segment.lows.data() + end, 1);
        __builtin_prefetch(segment.classes.data() + end - segment.margin, 1);
        __builtin_prefetch(segment.tokens.data() + end - windows_.gram());
        const uint32_t searched = runs_.ends_span(state.runs) ? runs_.periods() : scores_.searches(state.scores) ? scores_.periods() : 0;
        for (uint32_t i = 0; i < searched; i += 32) __builtin_prefetch(segment.highs.data() + end - searched + i);
        if (!state.scores.is_scored) return;
        for (uint32_t i = 0; i < scores_.periods(); i += 32) {
            __builtin_prefetch(segment.lows.data() + end - scores_.periods() + i);
            __builtin_prefetch(state.scores.scores.data() + state.scores.first_score + i, 1);
        }
    }

    // Whether the token completes a rule.
    bool advance(Slot& state, int32_t token) {
        Segment& segment = state.segment;
        windows_.roll(segment, state.windows, token);
        segment.push(token, static_cast<size_t>(token) < classes_.size() ? classes_[token] : static_cast<uint8_t>(kRow));
        const bool is_due = runs_.advance(segment, state.runs);
        const bool is_near = scores_.advance(segment, state.scores);
        return (is_due && runs_.check(segment, state.runs, state.hit)) || windows_.check(segment, state.windows, state.hit) ||
               (is_near && scores_.check(segment, state.scores, state.hit));
    }

    RepetitionLimits limits_;
    std::vector<uint8_t> classes_;
    BlockKinds kinds_;
    WindowCounter<HashBits> windows_;
    RunTracker runs_;
    NearScores scores_;
    std::vector<Slot> slots_;
    std::vector<uint32_t> free_;
};

}  // namespace thyme
