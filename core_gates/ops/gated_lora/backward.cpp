// The gradients of kernel.cpp for frozen adapters: one pass over the features recomputes the outputs
// of the adapters and gathers every sum, a second one subtracts what the norm of the base removes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../vectors.h"

namespace {

constexpr int TOKENS = 4;
constexpr int FEATURES = 64;  // of a packed piece of ``up``

struct Adapters {
    const int64_t* ends;
    int64_t count, ranks, dim;
    const float *up, *coefficients;
};

// Beyond ``count`` the last token is repeated with a gradient of zero.
struct Tokens {
    int64_t count;
    const float *grad[TOKENS], *base[TOKENS], *hidden[TOKENS], *mean[TOKENS], *rstd[TOKENS];
    float base_mean[TOKENS], base_rstd[TOKENS];
    float* grad_base[TOKENS];
};

// Sums over the features: of each token those of its norm, of each adapter and of each rank.
struct Sums {
    Vector norm[TOKENS][2];
    std::vector<Vector> adapters, ranks;

    Sums(int64_t count, int64_t rank) : adapters(count * TOKENS * 2), ranks(rank * TOKENS) {}

    void clear() {
        std::fill(&norm[0][0], &norm[0][0] + TOKENS * 2, Vector{});
        std::fill(adapters.begin(), adapters.end(), Vector{});
        std::fill(ranks.begin(), ranks.end(), Vector{});
    }
};

// Features ``d`` to ``d + LANES`` of the tokens; the rows of ``shared`` are gradients of coefficients.
void tile(const Tokens& tokens, const Adapters& adapters, int64_t d, Sums& sums, float* shared) {
    const int64_t dim = adapters.dim;
    const float* up = adapters.up + d / FEATURES * FEATURES * adapters.ranks + d % FEATURES;
    Vector c[5], n[TOKENS], shift[TOKENS], scale[TOKENS], grad[TOKENS];
    Vector total[TOKENS] = {}, logit[TOKENS] = {}, cross[TOKENS] = {};
    for (int j = 0; j < 5; ++j) c[j] = load(adapters.coefficients + j * dim + d);
    for (int t = 0; t < TOKENS; ++t) {
        n[t] = (load(tokens.base[t] + d) - tokens.base_mean[t]) * tokens.base_rstd[t];
        shift[t] = c[0] + c[1] * n[t];
        scale[t] = c[2] + c[3] * n[t];
        grad[t] = t < tokens.count ? load(tokens.grad[t] + d) : Vector{};
    }
    for (int64_t k = 0; k < adapters.count; ++k) {
        const int64_t start = k ? adapters.ends[k - 1] : 0, end = adapters.ends[k];
        Vector y[TOKENS] = {}, along[TOKENS];
        for (int64_t r = start; r < end; ++r) {
            const Vector row = load(up + r * FEATURES);
            for (int t = 0; t < TOKENS; ++t) y[t] += row * tokens.hidden[t][r];
        }
        for (int t = 0; t < TOKENS; ++t) {
            const float rstd = tokens.rstd[t][k];
            const Vector z = (y[t] - tokens.mean[t][k]) * rstd;
            const Vector gate = 1.f / (exponential(clamp(-(shift[t] + scale[t] * z))) + 1.f);
            const Vector direct = grad[t] * c[4] * gate;
            const Vector of_logit = direct * (1.f - gate) * y[t];
            const Vector of_normal = of_logit * scale[t];
            total[t] += gate * y[t];
            logit[t] += of_logit;
            cross[t] += of_logit * z;
            Vector* of_adapter = &sums.adapters[(k * TOKENS + t) * 2];
            of_adapter[0] += of_normal;
            of_adapter[1] += of_normal * z;
            along[t] = direct + rstd * of_normal;
        }
        for (int64_t r = start; r < end; ++r) {
            const Vector row = load(up + r * FEATURES);
            for (int t = 0; t < TOKENS; ++t) sums.ranks[r * TOKENS + t] += row * along[t];
        }
    }
    Vector rows[5] = {};
    for (int t = 0; t < TOKENS; ++t) {
        const Vector of_normal = c[1] * logit[t] + c[3] * cross[t];
        sums.norm[t][0] += of_normal;
        sums.norm[t][1] += of_normal * n[t];
        if (t < tokens.count) store(tokens.grad_base[t] + d, of_normal);
        rows[0] += logit[t];
        rows[1] += logit[t] * n[t];
        rows[2] += cross[t];
        rows[3] += cross[t] * n[t];
        rows[4] += grad[t] * total[t];
    }
    for (int j = 0; j < 5; ++j) store(shared + j * dim + d, load(shared + j * dim + d) + rows[j]);
}

void normalize(const float* values, int64_t dim, float eps, float& mean, float& rstd) {
    Vector total{}, squares{};
    for (int64_t d = 0; d < dim; d += LANES) total += load(values + d);
    mean = sum(total) / dim;
    for (int64_t d = 0; d < dim; d += LANES) {
        const Vector deviation = load(values + d) - mean;
        squares += deviation * deviation;
    }
    rstd = 1 / std::sqrt(sum(squares) / dim + eps);
}

}  // namespace

// grad, base and grad_base (N, dim) with dim a multiple of 64, hidden (N, R), mean and rstd (N, K),
// up (dim / 64, R, 64), coefficients (groups, 5, dim) for every ``group`` tokens, along (N, R), sums
// (N, K, 2), and shared (N / chunk, 5, dim), of which every call adds to the piece of its rows.
extern "C" void mix_backward(const float* grad, const float* base, const float* hidden,
                             const float* mean, const float* rstd, const float* up,
                             const float* coefficients, const int64_t* ends, float* grad_base,
                             float* along, float* sums_out, float* shared, int64_t count,
                             int64_t dim, int64_t group, int64_t chunk, float eps, int64_t start,
                             int64_t end) {
    coefficients += start / group * 5 * dim;
    const int64_t ranks = ends[count - 1];
    const Adapters adapters{ends, count, ranks, dim, up, coefficients};
    Sums sums(count, ranks);
    float* own = shared + start / chunk * 5 * dim;
    for (int64_t first = start; first < end; first += TOKENS) {
        Tokens one;
        one.count = std::min<int64_t>(TOKENS, end - first);
        for (int64_t t = 0; t < TOKENS; ++t) {
            const int64_t row = std::min(first + t, end - 1);
            one.grad[t] = grad + row * dim, one.base[t] = base + row * dim;
            one.hidden[t] = hidden + row * ranks;
            one.mean[t] = mean + row * count, one.rstd[t] = rstd + row * count;
            one.grad_base[t] = grad_base + row * dim;
            normalize(one.base[t], dim, eps, one.base_mean[t], one.base_rstd[t]);
        }
        sums.clear();
        for (int64_t d = 0; d < dim; d += LANES) tile(one, adapters, d, sums, own);
        for (int64_t t = 0; t < one.count; ++t) {
            const int64_t row = first + t;
            for (int64_t r = 0; r < ranks; ++r)
                along[row * ranks + r] = sum(sums.ranks[r * TOKENS + t]);
            for (int64_t k = 0; k < count; ++k)
                for (int j = 0; j < 2; ++j)
                    sums_out[(row * count + k) * 2 + j] =
                        sum(sums.adapters[(k * TOKENS + t) * 2 + j]);
            const float center = sum(sums.norm[t][0]) / dim, slant = sum(sums.norm[t][1]) / dim;
            for (int64_t d = 0; d < dim; d += LANES) {
                const Vector n = (load(one.base[t] + d) - one.base_mean[t]) * one.base_rstd[t];
                const Vector found = load(one.grad_base[t] + d) - center - n * slant;
                store(one.grad_base[t] + d, load(one.grad[t] + d) + one.base_rstd[t] * found);
            }
        }
    }
}
