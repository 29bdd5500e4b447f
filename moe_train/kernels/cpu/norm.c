// RMSNorm on a CPU, of a sum that is made on the way: what is added to the residual stream, the stream, its norm in BF16 for
// products and in FP32 for what must not be rounded take one visit of a row, and their gradients another.
//
// Cores take parts of the rows; each part has its own sum of the weight's gradient, added up in the order of the parts.
#include "products.h"

typedef struct {
    int64_t rows, width, parts;
    int64_t *next;            // part
    const void *x;            // (m, d), rows `stride` apart, in BF16 or FP32
    int64_t stride, narrow;   // `narrow`: x, and its gradient, are in BF16
    const bf16 *added;        // (m, d), or none
    const float *weight;      // (d)
    float *total;             // (m, d): x + added; written forward where something is added, read backward
    bf16 *normed;             // (m, d), or none
    float *wide;              // (m, d): the same in FP32, or none
    // Backward alone; gradients that there are not are none:
    const bf16 *grad_normed;
    const float *grad_wide, *grad_total;
    void *grad_x;             // (m, d)
    bf16 *grad_added;         // (m, d), or none
    float *grad_weight;       // (parts, d)
    float eps;
} Norm;

static inline __m512 at(const Norm *n, int64_t row, int64_t j, __mmask16 mask) {
    return n->narrow ? widened_at((const bf16 *)n->x + row * n->stride + j, mask)
                     : _mm512_maskz_loadu_ps(mask, (const float *)n->x + row * n->stride + j);
}

// 1 / rms of a row whose squares sum to this.
static inline __m512 scale_of(const Norm *n, __m512 squares) {
    return _mm512_set1_ps(1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(squares) / n->width + n->eps));
}

void norm_forward(const Norm *n) {
    int64_t d = n->width, part;
    while ((part = __atomic_fetch_add(n->next, 1, __ATOMIC_RELAXED)) < n->parts)
        for (int64_t row = n->rows * part / n->parts; row < n->rows * (part + 1) / n->parts; row++) {
            __m512 squares = _mm512_setzero_ps();
            float *total = n->total + row * d;
            FOR_LANES(j, d, mask, {
                __m512 x = at(n, row, j, mask);
                if (n->added) {
                    x = _mm512_add_ps(x, widened_at(n->added + row * d + j, mask));
                    _mm512_mask_storeu_ps(total + j, mask, x);
                }
                squares = _mm512_fmadd_ps(x, x, squares);
            });
            __m512 scale = scale_of(n, squares);
            FOR_LANES(j, d, mask, {
                __m512 x = n->added ? _mm512_maskz_loadu_ps(mask, total + j) : at(n, row, j, mask);
                x = _mm512_mul_ps(_mm512_mul_ps(x, scale), _mm512_maskz_loadu_ps(mask, n->weight + j));
                if (n->normed) store_narrow(n->normed + row * d + j, mask, x);
                if (n->wide) _mm512_mask_storeu_ps(n->wide + row * d + j, mask, x);
            });
        }
}

static inline __m512 gradient_at(const Norm *n, int64_t place, __mmask16 mask) {
    __m512 grad = n->grad_normed ? widened_at(n->grad_normed + place, mask) : _mm512_setzero_ps();
    return n->grad_wide ? _mm512_add_ps(grad, _mm512_maskz_loadu_ps(mask, n->grad_wide + place)) : grad;
}

// With s = 1 / rms(x): dx = s dy w - x s^3 (sum of dy w x) / d, beside what comes along the stream; dw = sum of s dy x.
void norm_backward(const Norm *n) {
    int64_t d = n->width, part;
    while ((part = __atomic_fetch_add(n->next, 1, __ATOMIC_RELAXED)) < n->parts) {
        float *grad_weight = n->grad_weight + part * d;
        memset(grad_weight, 0, sizeof(float) * d);
        for (int64_t row = n->rows * part / n->parts; row < n->rows * (part + 1) / n->parts; row++) {
            __m512 squares = _mm512_setzero_ps(), along = _mm512_setzero_ps();
            FOR_LANES(j, d, mask, {
                __m512 x = at(n, row, j, mask), grad = gradient_at(n, row * d + j, mask);
                squares = _mm512_fmadd_ps(x, x, squares);
                grad = _mm512_mul_ps(grad, _mm512_maskz_loadu_ps(mask, n->weight + j));
                along = _mm512_fmadd_ps(grad, x, along);
            });
            __m512 scale = scale_of(n, squares), cube = _mm512_mul_ps(scale, _mm512_mul_ps(scale, scale));
            along = _mm512_mul_ps(cube, _mm512_set1_ps(_mm512_reduce_add_ps(along) / -d));
            FOR_LANES(j, d, mask, {
                int64_t place = row * d + j;
                __m512 x = at(n, row, j, mask), grad = _mm512_mul_ps(gradient_at(n, place, mask), scale);
                __m512 sum = _mm512_fmadd_ps(grad, x, _mm512_maskz_loadu_ps(mask, grad_weight + j));
                _mm512_mask_storeu_ps(grad_weight + j, mask, sum);
                grad = _mm512_fmadd_ps(x, along, _mm512_mul_ps(grad, _mm512_maskz_loadu_ps(mask, n->weight + j)));
                if (n->grad_total) grad = _mm512_add_ps(grad, _mm512_maskz_loadu_ps(mask, n->grad_total + place));
                if (n->grad_added) store_narrow(n->grad_added + place, mask, grad);
                if (n->narrow)
                    store_narrow((bf16 *)n->grad_x + place, mask, grad);
                else
                    _mm512_mask_storeu_ps((float *)n->grad_x + place, mask, grad);
            });
        }
    }
}
