// Muon's step of a matrix in the cache of a core: momentum, Newton-Schulz in BF16 with FP32 sums, and the weight.
//
// The Gram matrix is that of the shorter side, s × s; it and its square are symmetric, so of their rows only what lies
// up to the diagonal is multiplied. Cores take the next matrix from a common count.
#include "products.h"

typedef struct {
    int64_t matrices, rows, columns;
    int64_t *next;
    const float *const *gradient;  // of each matrix
    float *const *momentum, *const *parameter;
    int64_t steps, nesterov;
    float keep, learn, decay;  // of the momentum; the learning rate, scaled; what is left of a weight
} Muon;

enum { BAND = 48 };  // rows multiplied up to where the diagonal leaves them

static const float FIRST = 3.4445f, THIRD = -4.7750f, FIFTH = 2.0315f;  // training/muon.py

// Symmetric C = A · B (s, s), its upper part from the lower.
static void multiply_symmetric(const pair *const *a, int64_t step, const pair *b, int64_t k, int64_t s, float *c,
                               int64_t stride) {
    for (int64_t row = 0; row < s; row += BAND) {
        int64_t end = least(s, row + BAND);
        multiply(a + row, step, end - row, b, k, k, end, c + row * stride, stride, 0);
    }
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(count, _mm512_set1_epi32((int)stride));
    for (int64_t i = 0; i < s; i++)
        for (int64_t j = i + 1; j < s; j += LANES) {
            __mmask16 mask = first_lanes(s - j);
            __m512 below = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, apart, c + j * stride + i, sizeof(float));
            _mm512_mask_storeu_ps(c + i * stride + j, mask, below);
        }
}

// The momentum moves towards the gradient; the direction goes to `sums`, and the square of its norm is returned.
static float direction(const Muon *m, int64_t matrix, float *sums) {
    int64_t size = m->rows * m->columns;
    const float *gradient = m->gradient[matrix];
    float *momentum = m->momentum[matrix];
    const __m512 keep = _mm512_set1_ps(m->keep), rest = _mm512_set1_ps(1 - m->keep);
    __m512 square = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += LANES) {
        __mmask16 mask = first_lanes(size - i);
        __m512 g = _mm512_maskz_loadu_ps(mask, gradient + i), v = _mm512_maskz_loadu_ps(mask, momentum + i);
        v = _mm512_fmadd_ps(v, keep, _mm512_mul_ps(g, rest));
        _mm512_mask_storeu_ps(momentum + i, mask, v);
        __m512 d = m->nesterov ? _mm512_fmadd_ps(v, keep, _mm512_mul_ps(g, rest)) : v;
        square = _mm512_fmadd_ps(d, d, square);
        _mm512_mask_storeu_ps(sums + i, mask, d);
    }
    return _mm512_reduce_add_ps(square);
}

void muon_step(const Muon *m) {
    int64_t rows = m->rows, columns = m->columns, size = rows * columns, tall = rows > columns;
    int64_t s = least(rows, columns), wide = up(columns, LANES), square = up(s, LANES), matrix;
    Scratch scratch = {0};
    float *sums = take(&scratch, sizeof(float) * most(rows * wide, size + LANES));
    float *gram = take(&scratch, sizeof(float) * s * square);
    bf16 *x = take(&scratch, sizeof(bf16) * size), *g = take(&scratch, sizeof(bf16) * s * s);
    pair *packed_x = take(&scratch, tall ? packed_bytes(rows, columns) : most(packed_bytes(columns, rows), packed_bytes(rows, columns)));
    pair *packed_g = take(&scratch, packed_bytes(s, s));
    const pair **a = take(&scratch, sizeof(pair *) * most(rows, columns));
    const bf16 **at = take(&scratch, sizeof(bf16 *) * most(rows, columns));
    while (!scratch.missing && (matrix = __atomic_fetch_add(m->next, 1, __ATOMIC_RELAXED)) < m->matrices) {
        // The Frobenius norm is at least the spectral one: all singular values start within [0, 1].
        float norm = _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(direction(m, matrix, sums))));
        __m512 scale = _mm512_set1_ps(1 / (norm > 1e-7f || norm != norm ? norm : 1e-7f));
        for (int64_t i = 0; i < size; i += LANES) {
            __mmask16 mask = first_lanes(size - i);
            store_narrow(x + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, sums + i), scale));
        }
        for (int64_t step = 0; step < m->steps; step++) {
            rows_from(x, columns, rows, at);
            if (tall) {  // x^T x
                pack_rows(at, rows, columns, packed_x), columns_from(packed_x, rows, columns, a);
                multiply_symmetric(a, COLUMNS, packed_x, rows, s, gram, square);
            } else {  // x x^T
                pack_columns(x, columns, columns, rows, packed_x);
                for (int64_t i = 0; i < rows; i++) a[i] = (const pair *)at[i];
                multiply_symmetric(a, 1, packed_x, columns, s, gram, square);
                pack_rows(at, rows, columns, packed_x);
            }
            for (int64_t i = 0; i < s; i++) narrow_row(gram + i * square, s, g + i * s);
            rows_from(g, s, s, at), pack_rows(at, s, s, packed_g);
            for (int64_t i = 0; i < s; i++) a[i] = (const pair *)at[i];
            multiply_symmetric(a, 1, packed_g, s, s, gram, square);
            for (int64_t i = 0; i < s; i++)
                for (int64_t j = 0; j < s; j += LANES) {
                    __mmask16 mask = first_lanes(s - j);
                    __m512 twice = _mm512_mul_ps(_mm512_set1_ps(FIFTH), _mm512_maskz_loadu_ps(mask, gram + i * square + j));
                    store_narrow(g + i * s + j, mask, _mm512_fmadd_ps(_mm512_set1_ps(THIRD), widened_at(g + i * s + j, mask), twice));
                }
            if (tall) {
                pack_rows(at, s, s, packed_g);
                for (int64_t i = 0; i < rows; i++) a[i] = (const pair *)(x + i * columns);
                multiply(a, 1, rows, packed_g, s, s, columns, sums, wide, 0);
            } else {
                multiply(a, 1, rows, packed_x, rows, rows, columns, sums, wide, 0);
            }
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < columns; j += LANES) {
                    __mmask16 mask = first_lanes(columns - j);
                    bf16 *to = x + i * columns + j;
                    __m512 sum = _mm512_maskz_loadu_ps(mask, sums + i * wide + j);
                    store_narrow(to, mask, _mm512_fmadd_ps(_mm512_set1_ps(FIRST), widened_at(to, mask), sum));
                }
        }
        float *parameter = m->parameter[matrix];
        for (int64_t i = 0; i < size; i += LANES) {
            __mmask16 mask = first_lanes(size - i);
            __m512 left = _mm512_mul_ps(_mm512_set1_ps(m->decay), _mm512_maskz_loadu_ps(mask, parameter + i));
            left = _mm512_fnmadd_ps(_mm512_set1_ps(m->learn), widened_at(x + i, mask), left);
            _mm512_mask_storeu_ps(parameter + i, mask, left);
        }
    }
    if (let_go(&scratch)) m->next[1] = 1;
}
