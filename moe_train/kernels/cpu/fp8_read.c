// What was rounded to FP8, read: as wide numbers, and what rounding lost of them.
#include "fp8_source.h"

typedef struct {
    Source source;  // in FP8
    int64_t narrow;
    void *to;  // (n, k) in FP32, or in BF16
} Widening;

void fp8_widen(const Widening *w) {
    const Source *s = &w->source;
    int64_t width = up(s->inner, LANES);
    Scratch scratch = {0};
    float *x = take(&scratch, sizeof(float) * width);
    Piece piece;
    while (!scratch.missing && find_piece(s, __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED), &piece))
        for (int64_t row = piece.first; row < piece.first + piece.count; row++) {
            widen(s, row, 1, 0, s->inner, x, width);
            if (w->narrow)
                narrow_row(x, s->inner, (bf16 *)w->to + row * s->inner);
            else
                memcpy((float *)w->to + row * s->inner, x, sizeof(float) * s->inner);
        }
    if (let_go(&scratch)) s->next[1] = 1;
}

typedef struct {
    Source source;                         // before it was rounded
    int64_t e5m2, turned;                  // to what, and whether along tokens
    int64_t values_stride, scales_stride;  // between rows
    const uint8_t *values;                 // (n, k), or (k, 128 p)
    const float *scales_of_values;         // (n, ⌈k / 128⌉), or (k, p)
    int64_t *counts;                       // as precision/health.py says: not zero, stored as not zero, not finite, cut off
} Counting;

// Of `n` stored numbers.
static void count_stored(const Counting *c, const uint8_t *values, int64_t n, int64_t *counts) {
    for (int64_t j = 0; j < n; j += 64) {
        __mmask64 mask = n - j >= 64 ? ~0ull : (1ull << (n - j)) - 1;
        __m512i bits = _mm512_and_si512(_mm512_maskz_loadu_epi8(mask, values + j), _mm512_set1_epi8(0x7f));
        counts[1] += __builtin_popcountll(_mm512_cmpneq_epu8_mask(bits, _mm512_setzero_si512()));
        counts[2] += __builtin_popcountll(_mm512_cmpge_epu8_mask(bits, _mm512_set1_epi8(c->e5m2 ? 0x7c : 0x7f)));
    }
}

// Of a row (n) whose numbers have these scales, `together` of them the same one.
static void count_row(const Counting *c, const float *x, int64_t n, const float *scales, int64_t together,
                      int64_t *counts) {
    // The largest value and half a step: what is beyond was cut off.
    const __m512 limit = _mm512_set1_ps(c->e5m2 ? 61440.0f : 464.0f);
    for (int64_t j = 0; j < n; j += LANES) {
        __mmask16 mask = first_lanes(n - j);
        __m512i magnitude = magnitude_of(_mm512_maskz_loadu_ps(mask, x + j));
        __m512 scale = together > 1 ? _mm512_set1_ps(scales[j / together]) : _mm512_maskz_loadu_ps(mask, scales + j);
        __mmask16 beyond = _mm512_cmp_ps_mask(_mm512_castsi512_ps(magnitude), _mm512_mul_ps(scale, limit), _CMP_GT_OQ);
        counts[0] += __builtin_popcount(_mm512_test_epi32_mask(magnitude, magnitude));
        counts[3] += __builtin_popcount(beyond & is_finite(magnitude) & mask);
    }
}

void fp8_count(const Counting *c) {
    const Source *s = &c->source;
    int64_t width = up(s->inner, LANES), counts[4] = {0};
    Scratch scratch = {0};
    float *x = take(&scratch, sizeof(float) * width), *scales = take(&scratch, sizeof(float) * width);
    Piece piece;
    while (!scratch.missing && find_piece(s, __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED), &piece)) {
        for (int64_t j = 0; j < s->inner && c->turned; j++) {
            scales[j] = c->scales_of_values[j * c->scales_stride + piece.index];
            count_stored(c, c->values + j * c->values_stride + piece.index * PIECE, PIECE, counts);
        }
        for (int64_t row = piece.first; row < piece.first + piece.count; row++) {
            widen(s, row, 1, 0, s->inner, x, width);
            if (c->turned) {
                count_row(c, x, s->inner, scales, 1, counts);
            } else {
                count_row(c, x, s->inner, c->scales_of_values + row * c->scales_stride, PIECE, counts);
                count_stored(c, c->values + row * c->values_stride, s->inner, counts);
            }
        }
    }
    for (int i = 0; i < 4; i++) __atomic_fetch_add(c->counts + i, counts[i], __ATOMIC_RELAXED);
    if (let_go(&scratch)) s->next[1] = 1;
}
