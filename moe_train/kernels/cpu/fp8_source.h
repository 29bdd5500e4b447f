// What is rounded to FP8, or was: rows of numbers in groups, a piece of them at a time, 128 rows of a group or fewer.
#pragma once
#include "fp8_numbers.h"

enum { FLOAT32, BFLOAT16, E4M3, E5M2 };

typedef struct {
    int64_t rows, inner, groups, format, stride;  // n, k, e; how far apart rows are
    int64_t *next;                                // piece
    const void *x;                                // (n, k)
    const float *scales;                          // of x in FP8 (n, ⌈k / 128⌉)
    const int32_t *ends;                          // (e): where a group's rows end
} Source;

typedef struct {
    int64_t group, first, count, index;
} Piece;

// Whether there is a piece with this index; where there is none, where the last group ends, and how many there are.
static inline int find_piece(const Source *s, int64_t index, Piece *piece) {
    int64_t start = 0, before = 0;
    for (int64_t group = 0; group < s->groups; group++) {
        int64_t end = s->ends[group], count = pieces_of(end - start);
        if (index < before + count) {
            int64_t first = start + (index - before) * PIECE;
            *piece = (Piece){group, first, least(PIECE, end - first), index};
            return 1;
        }
        before += count, start = end;
    }
    *piece = (Piece){s->groups, start, 0, before};
    return 0;
}

static inline __attribute__((always_inline)) void widen_rows(const Source *s, const int format, int64_t first,
                                                             int64_t count, int64_t column, int64_t some, float *to,
                                                             int64_t width) {
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i;
        for (int64_t j = 0; j < some; j += LANES) {
            __mmask16 mask = first_lanes(some - j);
            int64_t at = row * s->stride + column + j;
            __m512 x;
            if (format == FLOAT32)
                x = _mm512_maskz_loadu_ps(mask, (const float *)s->x + at);
            else if (format == BFLOAT16)
                x = widened_at((const bf16 *)s->x + at, mask);
            else
                x = _mm512_mul_ps(widened_fp8(_mm_maskz_loadu_epi8(mask, (const uint8_t *)s->x + at), format == E5M2),
                                  _mm512_set1_ps(s->scales[row * pieces_of(s->inner) + (column + j) / PIECE]));
            _mm512_storeu_ps(to + i * width + j, x);
        }
    }
}

// Some columns of some rows in FP32, `width` apart and with zeros up to a whole register.
static inline void widen(const Source *s, int64_t first, int64_t count, int64_t column, int64_t some, float *to,
                         int64_t width) {
    switch (s->format) {
        case FLOAT32: widen_rows(s, FLOAT32, first, count, column, some, to, width); break;
        case BFLOAT16: widen_rows(s, BFLOAT16, first, count, column, some, to, width); break;
        case E4M3: widen_rows(s, E4M3, first, count, column, some, to, width); break;
        default: widen_rows(s, E5M2, first, count, column, some, to, width);
    }
}
