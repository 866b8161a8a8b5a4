// The logistic function, in a form that compilers vectorize.
#pragma once
#include <cstdint>
#include <cstring>

// With a relative error of 2e-7: exp is 2^n times a polynomial (Cephes). Beyond ±80, where the
// result is 0 or 1 to 35 digits, x is clamped; what is not a number stays so.
static inline float sigmoid(float x) {
    float t = -x;
    t = t > 80.f ? 80.f : t;
    t = t < -80.f ? -80.f : t;
    const float shifted = t * 1.44269504f + 12582912.f;  // rounds to an integer in the low bits
    const float n = shifted - 12582912.f;
    const float r = (t - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    int32_t bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &shifted, sizeof power);
    bits += static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
    std::memcpy(&p, &bits, sizeof p);
    return 1.f / (1.f + p);
}
