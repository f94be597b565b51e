// e^x that compilers turn into vector code, the same in every kernel.
#pragma once

#include <cstdint>
#include <cstring>

#define THYME_INLINE [[gnu::always_inline]] inline

namespace thyme {

// e^x for x below 88, within 2 ulp; 0 below the normal numbers, NaN for NaN.
THYME_INLINE float exponential(float x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    const float shifted = x * 1.44269504f + kRound;
    const float whole = shifted - kRound;
    const float part = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts, the first of 9 bits
    // 1 + r + r^2 q(r), q of degree 4 fitted to the relative error on [-ln 2 / 2, ln 2 / 2], which is 3e-9.
    float y = 1.38146e-3f;
    y = y * part + 8.36872e-3f;
    y = y * part + 4.166839e-2f;
    y = y * part + 1.6666521e-1f;
    y = y * part + 4.9999993e-1f;
    y = y * part + 1.0f;
    y = y * part + 1.0f;
    uint32_t exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 127u) << 23;  // the bits of kRound leave on the left
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < -87.0f ? 0.0f : y * power;
}

}  // namespace thyme
