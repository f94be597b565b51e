// Rabin-Karp rolling hash of the last `window` tokens (Karp and Rabin, 1987): sum of (token + 1) * base^age modulo 2^Bits - 1.
// The modulus is a Mersenne prime, so products reduce by folding, and the base is drawn at random: no input can be prepared
// against it, unlike natural overflow modulo 2^64, under which Thue-Morse strings collide for every base.
#pragma once

#include <cstdint>
#include <random>

namespace thyme {

template <int Bits>
class RollingHash {
  public:
    static constexpr uint64_t kModulus = (uint64_t{1} << Bits) - 1;

    explicit RollingHash(uint32_t window) {
        std::random_device entropy;
        base_ = 2 + ((uint64_t{entropy()} << 32) | entropy()) % (kModulus - 2);
        base_to_window_ = 1;
        for (uint32_t i = 0; i < window; ++i) base_to_window_ = multiply(base_to_window_, base_);
    }

    // Hash after `incoming` enters and `outgoing` leaves; -1 stands for "before the segment" and weighs nothing.
    uint64_t roll(uint64_t hash, int32_t incoming, int32_t outgoing) const {
        const uint64_t gained = multiply(hash, base_) + weight(incoming);
        const uint64_t lost = multiply(base_to_window_, weight(outgoing));
        const uint64_t next = fold(gained + kModulus - lost);
        return next >= kModulus ? next - kModulus : next;
    }

  private:
    static uint64_t weight(int32_t token) { return static_cast<uint64_t>(int64_t{token} + 1) % kModulus; }
    static uint64_t fold(uint64_t x) { return (x & kModulus) + (x >> Bits); }
    static uint64_t multiply(uint64_t a, uint64_t b) {
        const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
        const uint64_t sum = (static_cast<uint64_t>(product) & kModulus) + static_cast<uint64_t>(product >> Bits);
        return sum >= kModulus ? sum - kModulus : sum;
    }

    uint64_t base_;
    uint64_t base_to_window_;
};

}  // namespace thyme
