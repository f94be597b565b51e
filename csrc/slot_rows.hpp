// Copies rows into places of a table given by number: keys and values of new tokens into a paged cache, whatever they are made of.
#pragma once

#include <cstdint>
#include <cstring>

namespace thyme {

// Row i, of `width` bytes at from + i * step, becomes row slots[i] of `to`; a slot of -1 is nowhere.
inline void write_slots(const char* from, int64_t step, int64_t width, const int64_t* slots, int64_t rows, char* to) {
    for (int64_t i = 0; i < rows; ++i)
        if (slots[i] >= 0) std::memcpy(to + slots[i] * width, from + i * step, static_cast<size_t>(width));
}

}  // namespace thyme
