#include "period_scan.hpp"

#include "simd.hpp"

namespace thyme {

THYME_CLONES uint64_t repeating_groups(const uint16_t* past, const uint16_t* last, size_t depth, size_t lanes) {
    const uint16_t first = last[0], second = last[depth > 1 ? 1 : 0], third = last[depth - 1];
    const size_t to_second = depth > 1 ? 1 : 0, to_third = depth - 1;
    // In most text there is none, and one look says so.
    uint16_t found = 0;
    for (size_t i = 0; i < lanes; ++i)
        found |= static_cast<uint16_t>((past[i] == first) & (past[i + to_second] == second) & (past[i + to_third] == third));
    if (found == 0) return 0;
    uint64_t groups = 0;
    for (size_t begin = 0; begin < lanes; begin += kGroup) {
        const size_t end = begin + kGroup < lanes ? begin + kGroup : lanes;
        uint16_t any = 0;
        for (size_t i = begin; i < end; ++i)
            any |= static_cast<uint16_t>((past[i] == first) & (past[i + to_second] == second) & (past[i + to_third] == third));
        groups |= static_cast<uint64_t>(any) << (begin / kGroup);
    }
    return groups;
}

static inline int16_t larger(int16_t a, int16_t b) { return a > b ? a : b; }
static inline int16_t smaller(int16_t a, int16_t b) { return a < b ? a : b; }
static inline int16_t mask(bool is) { return static_cast<int16_t>(-static_cast<int16_t>(is)); }

// All is 16 bits wide, so that a vector holds as many lanes as it can. Scores move down by one place, each written after its last use.
THYME_CLONES int16_t advance_scores(const uint16_t* __restrict past_high, const uint16_t* __restrict past_low, uint16_t high, uint16_t low,
                                    int16_t* __restrict scores, int16_t edit_cost, int16_t least, size_t periods) {
    int16_t most = 0;
    int16_t* const from = scores + 1;
    for (size_t i = 0; i < periods; ++i) {
        const auto equal = static_cast<int16_t>(mask(past_high[i] == high) & mask(past_low[i] == low));
        const int16_t below = scores[i], here = from[i], above = from[i + 1];
        const auto kept = static_cast<int16_t>((smaller(here, kMostScore - 1) + 1) & equal);
        const auto edited = static_cast<int16_t>(larger(here, larger(below, above)) - edit_cost);
        const int16_t score = larger(kept, static_cast<int16_t>(edited & mask(edited >= least)));
        scores[i] = score;
        most = larger(most, score);
    }
    scores[periods] = 0;
    return most;
}

THYME_CLONES bool is_any_reached(const int16_t* __restrict scores, const int16_t* __restrict target, size_t periods) {
    int16_t reached = 0;
    for (size_t i = 0; i < periods; ++i) reached = static_cast<int16_t>(reached | mask(scores[i] >= target[i]));
    return reached != 0;
}

}  // namespace thyme
