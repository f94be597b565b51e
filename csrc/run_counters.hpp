// The inner loop of the tail rule: for every period at once, how long the segment has been repeating at that distance.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thyme {

// past[i] is the token periods - i before `token`; run[i] counts how many of the latest tokens equal the one that far before.
// Returns the longest run.
int32_t advance_runs(const int32_t* __restrict past, int32_t token, int32_t* __restrict run, size_t periods);

}  // namespace thyme
