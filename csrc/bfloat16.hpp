// The 16-bit floating-point number that is the upper half of a float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace thyme {

struct Bfloat16 {
    uint16_t bits;
};

[[gnu::always_inline]] inline float widened(Bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest, to even where two are equally near; a NaN stays one.
[[gnu::always_inline]] inline Bfloat16 rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t up = bits + 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<uint16_t>((value == value ? up : bits | 0x400000u) >> 16)};
}

}  // namespace thyme
