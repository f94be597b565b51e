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

static inline int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

THYME_CLONES NearState advance_scores(const int32_t* __restrict past, int32_t token, int32_t* __restrict run,
                                      const int32_t* __restrict from, int32_t* __restrict to, const int32_t* __restrict target,
                                      int32_t edit_cost, int32_t least, size_t periods) {
    const int32_t seed = edit_cost + 1;
    int32_t most = 0, longest = 0, reached = 0;
    for (size_t i = 0; i < periods; ++i) {
        const int32_t equal = -static_cast<int32_t>(past[i] == token);
        const int32_t length = (run[i] + 1) & equal;
        run[i] = length;
        longest = larger(longest, length);
        const int32_t here = from[i];
        const int32_t kept = (here + 1) & equal & -static_cast<int32_t>(here > 0);
        const int32_t begun = seed & -static_cast<int32_t>(length == seed);
        const int32_t edited = larger(here, larger(from[static_cast<ptrdiff_t>(i) - 1], from[i + 1])) - edit_cost;
        const int32_t score = larger(larger(kept, begun), edited);  // kept and begun are not negative
        to[i] = score;
        most = larger(most, score);
        reached |= -static_cast<int32_t>(score >= target[i]);
    }
    return {reached != 0, most > 0 || longest >= least};
}

}  // namespace thyme
