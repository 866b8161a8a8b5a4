// Vectors of floats in the extension that GCC and Clang share, and what they lack.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline Vector load(const float* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

static inline void store(float* to, Vector value) { std::memcpy(to, &value, sizeof value); }

// exp for |x| <= LARGEST, with a relative error of 2e-7 (Cephes): 2^n times a polynomial.
constexpr float LARGEST = 40;

static inline Vector exponential(Vector x) {
    const Vector shifted = x * 1.44269504f + 12582912.f;  // rounds to an integer in the low bits
    const Vector n = shifted - 12582912.f;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    Integers bits, power;
    std::memcpy(&bits, &p, sizeof bits);
    std::memcpy(&power, &shifted, sizeof power);
    bits += power << 23;
    std::memcpy(&p, &bits, sizeof p);
    return x == x ? p : x;  // what is not a number stays so
}

static inline Vector clamp(Vector x) {
    x = x > LARGEST ? Vector{} + LARGEST : x;
    return x < -LARGEST ? Vector{} - LARGEST : x;
}

static inline float sum(Vector x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}
