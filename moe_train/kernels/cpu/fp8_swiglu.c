// SwiGLU in FP32 before its result, or its gradient, is rounded to the compute format and then to FP8. Cores take a part of
// the rows each.
#include "activation.h"
#include "products.h"

typedef struct {
    int64_t rows, width, parts, narrow;  // n, f; whether numbers are BF16
    int64_t *next;
    const void *gate_up;   // (n, 2f)
    const float *weight;   // (n), or null for 1
    void *h;               // (n, f): silu(gate) · up · weight
    const void *grad_h;    // backward alone
    void *grad_gate_up;
    float *grad_weight;
} Gated;

static inline __m512 number_at(const void *from, int64_t at, __mmask16 mask, int narrow) {
    return narrow ? widened_at((const bf16 *)from + at, mask) : _mm512_maskz_loadu_ps(mask, (const float *)from + at);
}
static inline void put(void *to, int64_t at, __mmask16 mask, __m512 x, int narrow) {
    if (narrow)
        store_narrow((bf16 *)to + at, mask, x);
    else
        _mm512_mask_storeu_ps((float *)to + at, mask, x);
}

void fp8_swiglu_forward(const Gated *s) {
    int64_t f = s->width, part;
    while ((part = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->parts)
        for (int64_t row = s->rows * part / s->parts; row < s->rows * (part + 1) / s->parts; row++) {
            __m512 weight = _mm512_set1_ps(s->weight ? s->weight[row] : 1.0f);
            for (int64_t j = 0; j < f; j += LANES) {
                __mmask16 mask = first_lanes(f - j);
                __m512 gate = number_at(s->gate_up, row * 2 * f + j, mask, s->narrow);
                __m512 other = number_at(s->gate_up, row * 2 * f + f + j, mask, s->narrow);
                __m512 both = _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), other);
                put(s->h, row * f + j, mask, _mm512_mul_ps(both, weight), s->narrow);
            }
        }
}

void fp8_swiglu_backward(const Gated *s) {
    const __m512 one = _mm512_set1_ps(1.0f);
    int64_t f = s->width, part;
    while ((part = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->parts)
        for (int64_t row = s->rows * part / s->parts; row < s->rows * (part + 1) / s->parts; row++) {
            __m512 weight = _mm512_set1_ps(s->weight ? s->weight[row] : 1.0f), total = _mm512_setzero_ps();
            for (int64_t j = 0; j < f; j += LANES) {
                __mmask16 mask = first_lanes(f - j);
                __m512 gate = number_at(s->gate_up, row * 2 * f + j, mask, s->narrow), share = sigmoid(gate);
                __m512 other = number_at(s->gate_up, row * 2 * f + f + j, mask, s->narrow);
                __m512 grad = number_at(s->grad_h, row * f + j, mask, s->narrow), active = _mm512_mul_ps(gate, share);
                __m512 slope = _mm512_fmadd_ps(active, _mm512_sub_ps(one, share), share);  // of silu
                total = _mm512_fmadd_ps(grad, _mm512_mul_ps(active, other), total);
                grad = _mm512_mul_ps(grad, weight);
                put(s->grad_gate_up, row * 2 * f + j, mask, _mm512_mul_ps(_mm512_mul_ps(grad, other), slope), s->narrow);
                put(s->grad_gate_up, row * 2 * f + f + j, mask, _mm512_mul_ps(grad, active), s->narrow);
            }
            if (s->weight) s->grad_weight[row] = _mm512_reduce_add_ps(total);
        }
}
