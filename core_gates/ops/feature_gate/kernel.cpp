// Feature gates whose logits are known: sigmoids, mixtures and products, in one pass over a block
// of k runs of the gates over n rows of one input. Rows are those of the input.
#include <cstdint>

#include "../sigmoid.h"

// ``logits`` (k, maps, n, dim); ``mixture`` (k, maps, ...): twice the weights, ``stride`` from map
// to map, from the block's first row on; ``out`` (k, n, dim).
extern "C" void open(const float* logits, const float* mixture, const float* v, float* out,
                     int64_t runs, int64_t maps, int64_t rows, int64_t dim, int64_t stride,
                     int64_t start, int64_t end) {
    for (int64_t run = 0; run < runs; ++run)
        for (int64_t row = start; row < end; ++row) {
            const float* __restrict x = v + row * dim;
            float* __restrict to = out + (run * rows + row) * dim;
            for (int64_t map = 0; map < maps; ++map) {
                const float* __restrict z = logits + ((run * maps + map) * rows + row) * dim;
                const float weight = mixture[(run * maps + map) * stride + row];
                if (map == 0) {
#pragma omp simd
                    for (int64_t d = 0; d < dim; ++d)
                        to[d] = x[d] + x[d] * (weight * (sigmoid(z[d]) - 0.5f));
                } else {
#pragma omp simd
                    for (int64_t d = 0; d < dim; ++d)
                        to[d] += x[d] * (weight * (sigmoid(z[d]) - 0.5f));
                }
            }
        }
}

// ``logits`` become their gradients; those of the mixture go to ``of_mixture``, laid out like
// ``mixture``. That of the input is written if ``first``, else added.
extern "C" void differentiate(float* logits, const float* mixture, const float* v,
                              const float* grad, float* of_v, float* of_mixture, int64_t first,
                              int64_t runs, int64_t maps, int64_t rows, int64_t dim,
                              int64_t stride, int64_t start, int64_t end) {
    for (int64_t row = start; row < end; ++row) {
        const float* __restrict x = v + row * dim;
        float* __restrict to = of_v + row * dim;
        if (first)
            for (int64_t d = 0; d < dim; ++d) to[d] = 0.f;
        for (int64_t run = 0; run < runs; ++run) {
            const float* __restrict outer = grad + (run * rows + row) * dim;
            for (int64_t d = 0; d < dim; ++d) to[d] += outer[d];
            for (int64_t map = 0; map < maps; ++map) {
                float* __restrict z = logits + ((run * maps + map) * rows + row) * dim;
                const int64_t place = (run * maps + map) * stride + row;
                const float weight = mixture[place];
                float sum = 0.f;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < dim; ++d) {
                    const float s = sigmoid(z[d]), along = outer[d] * x[d], t = s - 0.5f;
                    sum += along * t;
                    to[d] += outer[d] * (weight * t);
                    z[d] = along * (weight * (s - s * s));
                }
                of_mixture[place] = sum;
            }
        }
    }
}
