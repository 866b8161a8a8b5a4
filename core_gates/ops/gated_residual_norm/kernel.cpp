// y = x + s * branch and its LayerNorm, forwards and backwards, a row at a time: a row is read from
// memory once and stays in the first cache until all is done with it.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

namespace {

float sum(const float* __restrict values, int64_t dim) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < dim; ++d) total += values[d];
    return total;
}

float sum_of_squares(const float* __restrict values, float mean, int64_t dim) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < dim; ++d) total += (values[d] - mean) * (values[d] - mean);
    return total;
}

void statistics(const float* values, int64_t dim, float eps, float& mean, float& rstd) {
    mean = sum(values, dim) / dim;
    rstd = 1 / std::sqrt(sum_of_squares(values, mean, dim) / dim + eps);
}

// Sums of outer * weight, and of that times the normalized values.
void projections(const float* __restrict outer, const float* __restrict total,
                 const float* __restrict weight, float mean, float rstd, int64_t dim, float& plain,
                 float& along) {
    float first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t d = 0; d < dim; ++d) {
        const float scaled = outer[d] * weight[d];
        first += scaled;
        second += scaled * ((total[d] - mean) * rstd);
    }
    plain = first, along = second;
}

// Write a row past the caches: a line that is overwritten need not be read from memory before.
void stream(float* __restrict to, const float* __restrict from, int64_t dim) {
#ifdef __SSE__
    if (dim % 4 == 0 && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        for (int64_t d = 0; d < dim; d += 4) _mm_stream_ps(to + d, _mm_loadu_ps(from + d));
        return;
    }
#endif
    std::memcpy(to, from, dim * sizeof(float));
}

void finish() {
#ifdef __SSE__
    _mm_sfence();
#endif
}

}  // namespace

extern "C" void forward(const float* __restrict x, const float* __restrict branch,
                        const float* __restrict scores, const float* __restrict weight,
                        const float* __restrict bias, float* __restrict total,
                        float* __restrict normalized, int64_t dim, float eps, int64_t start,
                        int64_t end) {
    std::vector<float> buffers(2 * dim);
    float* __restrict sum = buffers.data();
    float* __restrict unit = sum + dim;
    for (int64_t row = start; row < end; ++row) {
        const int64_t at = row * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] = x[at + d] + scores[d] * branch[at + d];
        float mean, rstd;
        statistics(sum, dim, eps, mean, rstd);
        for (int64_t d = 0; d < dim; ++d) unit[d] = (sum[d] - mean) * rstd * weight[d] + bias[d];
        stream(total + at, sum, dim);
        stream(normalized + at, unit, dim);
    }
    finish();
}

// ``sums`` holds, for every chunk of rows, the gradients of scores, weight and bias.
extern "C" void backward(const float* __restrict grad_total, const float* __restrict grad_normalized,
                         const float* __restrict total, const float* __restrict branch,
                         const float* __restrict scores, const float* __restrict weight,
                         float* __restrict grad_x, float* __restrict grad_branch,
                         float* __restrict sums, int64_t dim, int64_t chunk, float eps,
                         int64_t start, int64_t end) {
    float* __restrict sum_scores = sums + start / chunk * 3 * dim;
    float* __restrict sum_weight = sum_scores + dim;
    float* __restrict sum_bias = sum_weight + dim;
    std::vector<float> buffers(2 * dim);
    float* __restrict inner = buffers.data();
    float* __restrict outwards = inner + dim;
    for (int64_t row = start; row < end; ++row) {
        const int64_t at = row * dim;
        float mean, rstd, plain, along;
        statistics(total + at, dim, eps, mean, rstd);
        projections(grad_normalized + at, total + at, weight, mean, rstd, dim, plain, along);
        plain /= dim, along /= dim;
        for (int64_t d = 0; d < dim; ++d) {
            const float outer = grad_normalized[at + d];
            const float unit = (total[at + d] - mean) * rstd;
            const float grad =
                grad_total[at + d] + rstd * (outer * weight[d] - plain - unit * along);
            inner[d] = grad;
            outwards[d] = grad * scores[d];
            sum_scores[d] += grad * branch[at + d];
            sum_weight[d] += outer * unit;
            sum_bias[d] += outer;
        }
        stream(grad_x + at, inner, dim);
        stream(grad_branch + at, outwards, dim);
    }
    finish();
}
