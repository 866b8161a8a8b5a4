// Mixtures of experts by the pairs of gate and expert that see each other. Rows are tokens; the
// pairs (gate, expert) are sorted by gate, their weights are (pairs, rows).
#include <cstdint>

// ``experts`` (experts, rows, dim) to ``out`` (gates, rows, dim), of which each has a pair.
extern "C" void mix(const float* experts, const float* weights, const int64_t* pairs, float* out,
                    int64_t number, int64_t rows, int64_t dim, int64_t start, int64_t end) {
    for (int64_t row = start; row < end; ++row)
        for (int64_t p = 0; p < number; ++p) {
            const float* __restrict from = experts + (pairs[2 * p + 1] * rows + row) * dim;
            float* __restrict to = out + (pairs[2 * p] * rows + row) * dim;
            const float weight = weights[p * rows + row];
            if (p == 0 || pairs[2 * p] != pairs[2 * p - 2]) {
                for (int64_t d = 0; d < dim; ++d) to[d] = weight * from[d];
            } else {
                for (int64_t d = 0; d < dim; ++d) to[d] += weight * from[d];
            }
        }
}

// Adds to ``of_experts``, writes ``of_weights``.
extern "C" void differentiate(const float* grad, const float* experts, const float* weights,
                              const int64_t* pairs, float* of_experts, float* of_weights,
                              int64_t number, int64_t rows, int64_t dim, int64_t start,
                              int64_t end) {
    for (int64_t row = start; row < end; ++row)
        for (int64_t p = 0; p < number; ++p) {
            const float* __restrict outer = grad + (pairs[2 * p] * rows + row) * dim;
            const int64_t place = (pairs[2 * p + 1] * rows + row) * dim;
            const float* __restrict from = experts + place;
            float* __restrict to = of_experts + place;
            const float weight = weights[p * rows + row];
            float sum = 0.f;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < dim; ++d) {
                sum += outer[d] * from[d];
                to[d] += weight * outer[d];
            }
            of_weights[p * rows + row] = sum;
        }
}
