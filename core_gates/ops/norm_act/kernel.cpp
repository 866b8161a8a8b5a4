// Batch normalization of stacked experts and their activation. Rows come in blocks, each of one
// output: what is summed over rows is summed within a block first, then over the blocks of an
// expert, so that results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../sigmoid.h"

namespace {

enum Activation : int64_t { IDENTITY = 0, RELU = 1, SILU = 2 };

template <int64_t KIND>
inline float activate(float z) {
    if (KIND == RELU) return z > 0.f ? z : (z == z ? 0.f : z);
    if (KIND == SILU) return z * sigmoid(z);
    return z;
}

template <int64_t KIND>
inline float slope(float z) {
    if (KIND == RELU) return z > 0.f ? 1.f : 0.f;
    if (KIND == SILU) {
        const float s = sigmoid(z);
        return s * (1.f + z * (1.f - s));
    }
    return 1.f;
}

struct Block {
    int64_t output, first, last;  // rows of the output
    Block(int64_t number, int64_t rows, int64_t block) {
        const int64_t blocks = (rows + block - 1) / block;
        output = number / blocks;
        first = number % blocks * block;
        last = std::min(first + block, rows);
    }
};

template <int64_t KIND>
void normalize(const float* __restrict x, const float* __restrict scale,
               const float* __restrict shift, float* __restrict out, int64_t rows,
               int64_t channels) {
    for (int64_t row = 0; row < rows; ++row) {
        const float* __restrict from = x + row * channels;
        float* __restrict to = out + row * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) to[c] = activate<KIND>(from[c] * scale[c] + shift[c]);
    }
}

template <int64_t KIND>
void differentiate(const float* __restrict grad, const float* __restrict x,
                   const float* __restrict mean, const float* __restrict rstd,
                   const float* __restrict weight, const float* __restrict bias,
                   float* __restrict slopes, float* __restrict total, float* __restrict along,
                   int64_t rows, int64_t channels) {
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = row * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
            const float unit = (x[at + c] - mean[c]) * rstd[c];
            const float found = grad[at + c] * slope<KIND>(unit * weight[c] + bias[c]);
            slopes[at + c] = found;
            total[c] += found;
            along[c] += found * unit;
        }
    }
}

}  // namespace

// ``sums``: mean and sum of squared deviations of every block (blocks, 2, channels).
extern "C" void moments(const float* __restrict x, float* __restrict sums, int64_t rows,
                        int64_t channels, int64_t block, int64_t start, int64_t end) {
    for (int64_t number = start; number < end; ++number) {
        const Block b(number, rows, block);
        const float* __restrict from = x + (b.output * rows + b.first) * channels;
        float* __restrict mean = sums + number * 2 * channels;
        float* __restrict squares = mean + channels;
        std::fill(mean, mean + 2 * channels, 0.f);
        const int64_t size = b.last - b.first;
        for (int64_t row = 0; row < size; ++row)
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) mean[c] += from[row * channels + c];
        for (int64_t c = 0; c < channels; ++c) mean[c] /= size;
        for (int64_t row = 0; row < size; ++row)
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c) {
                const float deviation = from[row * channels + c] - mean[c];
                squares[c] += deviation * deviation;
            }
    }
}

// Mean and variance of the experts [start, end) from the blocks of their outputs, of which expert e
// has those from ``firsts[e]`` to ``firsts[e + 1]``.
extern "C" void gather(const float* __restrict sums, const int64_t* __restrict firsts,
                       float* __restrict mean, float* __restrict variance, int64_t rows,
                       int64_t channels, int64_t block, int64_t start, int64_t end) {
    const int64_t blocks = (rows + block - 1) / block;
    std::vector<double> level(channels), spread(channels);
    for (int64_t e = start; e < end; ++e) {
        const double count = static_cast<double>(firsts[e + 1] - firsts[e]) * rows;
        std::fill(level.begin(), level.end(), 0.);
        std::fill(spread.begin(), spread.end(), 0.);
        for (int64_t n = firsts[e] * blocks; n < firsts[e + 1] * blocks; ++n) {
            const Block b(n, rows, block);
            const double share = (b.last - b.first) / count;
            for (int64_t c = 0; c < channels; ++c) level[c] += share * sums[n * 2 * channels + c];
        }
        for (int64_t n = firsts[e] * blocks; n < firsts[e + 1] * blocks; ++n) {
            const Block b(n, rows, block);
            const float* __restrict from = sums + n * 2 * channels;
            for (int64_t c = 0; c < channels; ++c) {
                const double shift = from[c] - level[c];
                spread[c] += from[channels + c] + (b.last - b.first) * shift * shift;
            }
        }
        for (int64_t c = 0; c < channels; ++c) {
            mean[e * channels + c] = static_cast<float>(level[c]);
            variance[e * channels + c] = static_cast<float>(spread[c] / count);
        }
    }
}

// ``scale`` and ``shift`` are those of the expert of every output (outputs, channels).
extern "C" void apply(const float* x, const float* scale, const float* shift, float* out,
                      int64_t activation, int64_t rows, int64_t channels, int64_t block,
                      int64_t start, int64_t end) {
    for (int64_t number = start; number < end; ++number) {
        const Block b(number, rows, block);
        const int64_t at = (b.output * rows + b.first) * channels, of = b.output * channels;
        const int64_t size = b.last - b.first;
        auto run = activation == SILU   ? normalize<SILU>
                   : activation == RELU ? normalize<RELU>
                                        : normalize<IDENTITY>;
        run(x + at, scale + of, shift + of, out + at, size, channels);
    }
}

// Gradients before the normalization, to ``slopes``, and their sums over every block, plain and
// times the normalized values, to ``sums`` (blocks, 2, channels). ``affine`` holds mean, reciprocal
// deviation, weight and bias of the expert of every output (outputs, 4, channels).
extern "C" void slopes(const float* grad, const float* x, const float* affine, float* slopes,
                       float* sums, int64_t activation, int64_t rows, int64_t channels,
                       int64_t block, int64_t start, int64_t end) {
    for (int64_t number = start; number < end; ++number) {
        const Block b(number, rows, block);
        const int64_t at = (b.output * rows + b.first) * channels;
        const float* mine = affine + b.output * 4 * channels;
        float* total = sums + number * 2 * channels;
        std::fill(total, total + 2 * channels, 0.f);
        auto run = activation == SILU   ? differentiate<SILU>
                   : activation == RELU ? differentiate<RELU>
                                        : differentiate<IDENTITY>;
        run(grad + at, x + at, mine, mine + channels, mine + 2 * channels, mine + 3 * channels,
            slopes + at, total, total + channels, b.last - b.first, channels);
    }
}

// Sums over the blocks of the experts [start, end).
extern "C" void add(const float* __restrict sums, const int64_t* __restrict firsts,
                    float* __restrict total, float* __restrict along, int64_t rows,
                    int64_t channels, int64_t block, int64_t start, int64_t end) {
    const int64_t blocks = (rows + block - 1) / block;
    std::vector<double> found(2 * channels);
    for (int64_t e = start; e < end; ++e) {
        std::fill(found.begin(), found.end(), 0.);
        for (int64_t n = firsts[e] * blocks; n < firsts[e + 1] * blocks; ++n)
            for (int64_t c = 0; c < 2 * channels; ++c) found[c] += sums[n * 2 * channels + c];
        for (int64_t c = 0; c < channels; ++c) {
            total[e * channels + c] = static_cast<float>(found[c]);
            along[e * channels + c] = static_cast<float>(found[channels + c]);
        }
    }
}

// From gradients before the normalization to those of ``x``, in place:
// ``scale (slope - level - slant x)``, the three of every output (outputs, 3, channels).
extern "C" void center(const float* x, const float* factors, float* __restrict slopes, int64_t rows,
                       int64_t channels, int64_t block, int64_t start, int64_t end) {
    for (int64_t number = start; number < end; ++number) {
        const Block b(number, rows, block);
        const float* __restrict scale = factors + b.output * 3 * channels;
        const float* __restrict level = scale + channels;
        const float* __restrict slant = level + channels;
        for (int64_t row = b.first; row < b.last; ++row) {
            const float* __restrict from = x + (b.output * rows + row) * channels;
            float* __restrict to = slopes + (b.output * rows + row) * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; ++c)
                to[c] = scale[c] * to[c] - (level[c] + slant[c] * from[c]);
        }
    }
}
