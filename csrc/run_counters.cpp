#include "run_counters.hpp"

#include "simd.hpp"

namespace thyme {

THYME_CLONES int32_t advance_runs(const int32_t* __restrict past, int32_t token, int32_t* __restrict run, size_t periods) {
    int32_t longest = 0;
    for (size_t i = 0; i < periods; ++i) {
        const int32_t length = (run[i] + 1) & -static_cast<int32_t>(past[i] == token);
        run[i] = length;
        longest = length > longest ? length : longest;
    }
    return longest;
}

}  // namespace thyme
