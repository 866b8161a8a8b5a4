// The output of K gated adapters for tokens whose statistics are known: low-rank matmuls, gates
// and sums stay in registers.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../vectors.h"

namespace {

constexpr int PARTS = LANES == 8 ? 2 : 4;
constexpr int TOKENS = 4, BLOCK = LANES * PARTS;  // a tile: tokens and features
constexpr int FEATURES = 64;                      // of a packed piece of ``up``

// Mean and inverse standard deviation of a multiple of BLOCK values.
void statistics(const float* values, int64_t dim, float eps, float& mean, float& rstd) {
    Vector sums[PARTS] = {}, squares[PARTS] = {};
    for (int64_t d = 0; d < dim; d += BLOCK)
        for (int i = 0; i < PARTS; ++i) sums[i] += load(values + d + i * LANES);
    float total = 0, spread = 0;
    for (int i = 0; i < BLOCK; ++i) total += sums[i / LANES][i % LANES];
    mean = total / dim;
    for (int64_t d = 0; d < dim; d += BLOCK)
        for (int i = 0; i < PARTS; ++i) {
            const Vector deviation = load(values + d + i * LANES) - mean;
            squares[i] += deviation * deviation;
        }
    for (int i = 0; i < BLOCK; ++i) spread += squares[i / LANES][i % LANES];
    rstd = 1 / std::sqrt(spread / dim + eps);
}

// What the tokens of a tile bring along. Beyond ``count`` the last token is repeated, unwritten.
struct Tokens {
    int64_t count;
    const float *base[TOKENS], *hidden[TOKENS], *mean[TOKENS], *rstd[TOKENS];
    float base_mean[TOKENS], base_rstd[TOKENS];
    float* out[TOKENS];
};

// Adapters: the rank where each one ends, and BLOCK features of theirs. Those of ``up`` lie FEATURES
// apart: rows as long as a page would push each other out of the first cache.
struct Adapters {
    const int64_t* ends;
    int64_t count, dim;
    const float *up, *coefficients;
};

// Features ``d`` to ``d + BLOCK`` of the tokens.
void tile(const Tokens& tokens, const Adapters& adapters, int64_t d) {
    Vector shift[TOKENS][PARTS], scale[TOKENS][PARTS], total[TOKENS][PARTS] = {};
    for (int i = 0; i < PARTS; ++i) {
        const float* row = adapters.coefficients + i * LANES;
        Vector c[4];
        for (int j = 0; j < 4; ++j) c[j] = load(row + j * adapters.dim);
        for (int t = 0; t < TOKENS; ++t) {
            const Vector base = load(tokens.base[t] + d + i * LANES);
            const Vector n = (base - tokens.base_mean[t]) * tokens.base_rstd[t];
            shift[t][i] = c[0] + c[1] * n;
            scale[t][i] = c[2] + c[3] * n;
        }
    }
    int64_t r = 0;
    for (int64_t k = 0; k < adapters.count; ++k) {
        Vector y[TOKENS][PARTS] = {};
        for (; r < adapters.ends[k]; ++r) {
            Vector row[PARTS];
            for (int i = 0; i < PARTS; ++i)
                row[i] = load(adapters.up + r * FEATURES + i * LANES);
            for (int t = 0; t < TOKENS; ++t)
                for (int i = 0; i < PARTS; ++i) y[t][i] += row[i] * tokens.hidden[t][r];
        }
        for (int t = 0; t < TOKENS; ++t) {
            const float mean = tokens.mean[t][k], rstd = tokens.rstd[t][k];
            Vector odds[PARTS];  // of a closed gate, plus 1: what y is divided by
            for (int i = 0; i < PARTS; ++i) {
                const Vector logit = shift[t][i] + scale[t][i] * ((y[t][i] - mean) * rstd);
                odds[i] = exponential(clamp(-logit)) + 1.f;
            }
            for (int i = 0; i < PARTS; i += 2) {  // one division for two
                const Vector inverse = 1.f / (odds[i] * odds[i + 1]);
                total[t][i] += y[t][i] * (inverse * odds[i + 1]);
                total[t][i + 1] += y[t][i + 1] * (inverse * odds[i]);
            }
        }
    }
    for (int64_t t = 0; t < tokens.count; ++t)
        for (int i = 0; i < PARTS; ++i) {
            const Vector out = load(adapters.coefficients + 4 * adapters.dim + i * LANES);
            const Vector base = load(tokens.base[t] + d + i * LANES);
            store(tokens.out[t] + d + i * LANES, base + out * total[t][i]);
        }
}

}  // namespace

// base and out (N, dim) with dim a multiple of 64, hidden (N, R), mean and rstd (N, K),
// up (dim / 64, R, 64), coefficients (groups, 5, dim) for every ``group`` tokens; a call has one.
extern "C" void mix(const float* base, const float* hidden, const float* mean, const float* rstd,
                    const float* up, const float* coefficients, const int64_t* ends, float* out,
                    int64_t count, int64_t dim, int64_t group, float eps, int64_t start,
                    int64_t end) {
    coefficients += start / group * 5 * dim;
    const int64_t ranks = ends[count - 1], tiles = (end - start + TOKENS - 1) / TOKENS;
    std::vector<Tokens> tokens(tiles);
    for (int64_t i = 0; i < tiles * TOKENS; ++i) {
        Tokens& one = tokens[i / TOKENS];
        const int64_t row = std::min(start + i, end - 1), t = i % TOKENS;
        if (start + i < end) one.count = t + 1;
        one.base[t] = base + row * dim, one.hidden[t] = hidden + row * ranks;
        one.mean[t] = mean + row * count, one.rstd[t] = rstd + row * count;
        one.out[t] = out + row * dim;
        statistics(one.base[t], dim, eps, one.base_mean[t], one.base_rstd[t]);
    }
    for (int64_t d = 0; d < dim; d += BLOCK) {
        const float* piece = up + d / FEATURES * FEATURES * ranks + d % FEATURES;
        const Adapters adapters{ends, count, dim, piece, coefficients + d};
        for (const Tokens& one : tokens) tile(one, adapters, d);
    }
}
