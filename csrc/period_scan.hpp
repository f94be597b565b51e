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

// No score is larger, so that a target may be out of reach.
constexpr int16_t kMostScore = 32766;

// Advances the scores of the near rule by a token; past_high[i] and past_low[i] are halves of the token periods - i before it.
// The scores were at scores[1 + i], with a 0 on either side, and are at scores[i] afterwards, with a 0 behind. Returns the largest.
int16_t advance_scores(const uint16_t* past_high, const uint16_t* past_low, uint16_t high, uint16_t low, int16_t* scores, int16_t edit_cost,
                       int16_t least, size_t periods);

// Whether scores[i] >= target[i] somewhere.
bool is_any_reached(const int16_t* scores, const int16_t* target, size_t periods);

}  // namespace thyme
