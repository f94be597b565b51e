// The inner loops over all periods at once. Lane i stands for the period periods - i, so that the past is read in order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thyme {

// Lanes of one group of `repeating_groups`.
constexpr size_t kGroup = 64;

// Bit g is set where, for some lane i of group g (lanes g * kGroup up to (g + 1) * kGroup), past[i + j] == last[j] for all j < depth.
// depth is 1, 2 or 3; at most 64 * kGroup lanes in one call.
uint64_t repeating_groups(const uint16_t* past, const uint16_t* last, size_t depth, size_t lanes);

struct NearState {
    bool is_reached;  // some score reached its target
    bool is_live;     // some score is above 0 or some run is at least `least`
};

// Advances the runs and scores of the near rule by `token`; past[i] is the token periods - i before it.
// run[i] counts how many of the latest tokens equal the one that far before. from[-1] and from[periods] must be 0.
NearState advance_scores(const int32_t* past, int32_t token, int32_t* run, const int32_t* from, int32_t* to, const int32_t* target,
                         int32_t edit_cost, int32_t least, size_t periods);

}  // namespace thyme
