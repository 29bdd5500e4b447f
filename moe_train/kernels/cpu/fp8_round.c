// Operands rounded to FP8 for products over their columns, over their rows, or both: bit for bit what
// precision/quantize.py does for every group. A piece, 128 rows of a group or fewer, is made FP32 once and then read from
// the second cache. And SwiGLU before it is rounded.
//
// Cores take the next piece from a common count. next[1] becomes 1 where memory was missing.
#include "activation.h"
#include "fp8_numbers.h"

enum { FLOAT32, BFLOAT16, E4M3, E5M2 };     // what is rounded
enum { NONE, TILE, BLOCK_OF, ROW, TENSOR };  // what shares a scale

typedef struct {
    int64_t shared, e5m2, power_of_two;
    uint8_t *values;
    float *scales;
} Layout;

typedef struct {
    int64_t rows, inner, groups, format, stride;  // n, k, e
    int64_t *next;                                // piece
    const void *x;                                // (n, k), rows `stride` apart
    const float *scales;                          // of x in FP8 (n, ⌈k / 128⌉)
    const int32_t *ends;                          // (e): where a group's rows end
    int32_t *largest;                             // (e, k): magnitudes in each group, as bits, where scales need them
    int64_t pieces;                               // there is room for so many in `along_tokens`
    int32_t *piece_ends;                          // (e)
    Layout along_rows, along_tokens;              // values (n, k), scales (n, ⌈k / 128⌉); (k, 128 p), (k, p)
} Rounding;

typedef struct {
    int64_t group, first, count, index;
} Piece;

// Whether there is a piece with this index; else where the last group ends, and how many there are.
static int find_piece(const Rounding *r, int64_t index, Piece *piece) {
    int64_t start = 0, before = 0;
    for (int64_t group = 0; group < r->groups; group++) {
        int64_t end = r->ends[group], count = pieces_of(end - start);
        if (index < before + count) {
            int64_t first = start + (index - before) * PIECE;
            *piece = (Piece){group, first, least(PIECE, end - first), index};
            return 1;
        }
        before += count, start = end;
    }
    *piece = (Piece){r->groups, start, 0, before};
    return 0;
}

static inline __attribute__((always_inline)) void widen_rows(const Rounding *r, const int format, int64_t first,
                                                             int64_t count, int64_t column, int64_t some, float *to,
                                                             int64_t width) {
    for (int64_t i = 0; i < count; i++) {
        int64_t row = first + i;
        for (int64_t j = 0; j < some; j += LANES) {
            __mmask16 mask = first_lanes(some - j);
            int64_t at = row * r->stride + column + j;
            __m512 x;
            if (format == FLOAT32)
                x = _mm512_maskz_loadu_ps(mask, (const float *)r->x + at);
            else if (format == BFLOAT16)
                x = widened_at((const bf16 *)r->x + at, mask);
            else
                x = _mm512_mul_ps(widened_fp8(_mm_maskz_loadu_epi8(mask, (const uint8_t *)r->x + at), format == E5M2),
                                  _mm512_set1_ps(r->scales[row * pieces_of(r->inner) + (column + j) / PIECE]));
            _mm512_storeu_ps(to + i * width + j, x);
        }
    }
}

// Some columns of some rows in FP32, `width` apart and with zeros up to a whole register.
static void widen(const Rounding *r, int64_t first, int64_t count, int64_t column, int64_t some, float *to,
                  int64_t width) {
    switch (r->format) {
        case FLOAT32: widen_rows(r, FLOAT32, first, count, column, some, to, width); break;
        case BFLOAT16: widen_rows(r, BFLOAT16, first, count, column, some, to, width); break;
        case E4M3: widen_rows(r, E4M3, first, count, column, some, to, width); break;
        default: widen_rows(r, E5M2, first, count, column, some, to, width);
    }
}

// Largest magnitudes in each group, 64 columns at a time.
void fp8_largest(const Rounding *r) {
    int64_t across = (r->inner + COLUMNS - 1) / COLUMNS, unit;
    Scratch scratch = {0};
    float *x = take(&scratch, sizeof(float) * PIECE * COLUMNS);
    while (!scratch.missing && (unit = __atomic_fetch_add(r->next, 1, __ATOMIC_RELAXED)) < r->groups * across) {
        int64_t group = unit / across, column = unit % across * COLUMNS, some = least(COLUMNS, r->inner - column);
        __m512i largest[COLUMNS / LANES] = {0};
        for (int64_t row = group ? r->ends[group - 1] : 0; row < r->ends[group]; row += PIECE) {
            int64_t count = least(PIECE, r->ends[group] - row);
            widen(r, row, count, column, some, x, COLUMNS);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < some; j += LANES)
                    largest[j / LANES] = larger(largest[j / LANES], _mm512_load_ps(x + i * COLUMNS + j));
        }
        for (int64_t j = 0; j < some; j += LANES)
            _mm512_mask_storeu_epi32(r->largest + group * r->inner + column + j, first_lanes(some - j),
                                     largest[j / LANES]);
    }
    if (let_go(&scratch)) r->next[1] = 1;
}

static int32_t largest_of(const int32_t *magnitudes, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = 0; i < n; i++) largest = magnitudes[i] > largest ? magnitudes[i] : largest;
    return largest;
}

static inline __attribute__((always_inline)) void store_row(const float *x, int64_t n, float scale, const int e5m2,
                                                            uint8_t *to) {
    for (int64_t j = 0; j < n; j += LANES)
        _mm_mask_storeu_epi8(to + j, first_lanes(n - j), to_fp8(_mm512_load_ps(x + j), _mm512_set1_ps(scale), e5m2));
}

// magnitudes: room for (count, blocks).
static void round_along_rows(const Rounding *r, const Piece *p, const float *x, int64_t width, int32_t *magnitudes) {
    const Layout *to = &r->along_rows;
    int64_t blocks = pieces_of(r->inner);
    for (int64_t i = 0; i < p->count && to->shared != TENSOR; i++)
        for (int64_t b = 0; b < blocks; b++) {
            __m512i largest = _mm512_setzero_si512();
            for (int64_t j = b * PIECE; j < least((b + 1) * PIECE, width); j += LANES)
                largest = larger(largest, _mm512_load_ps(x + i * width + j));
            magnitudes[i * blocks + b] = _mm512_reduce_max_epu32(largest);
        }
    int32_t all = to->shared == TENSOR ? largest_of(r->largest + p->group * r->inner, r->inner) : 0;
    for (int64_t b = 0; b < blocks && to->shared == BLOCK_OF; b++)
        for (int64_t i = p->count - 1; i > 0; i--)
            magnitudes[b] = largest_of((int32_t[]){magnitudes[b], magnitudes[i * blocks + b]}, 2);
    for (int64_t i = 0; i < p->count; i++) {
        const int32_t *own = magnitudes + i * blocks;
        if (to->shared == ROW) all = largest_of(own, blocks);
        for (int64_t b = 0; b < blocks; b++) {
            int32_t largest = to->shared == TILE ? own[b] : to->shared == BLOCK_OF ? magnitudes[b] : all;
            float scale = scale_of(largest, to->e5m2, to->power_of_two);
            int64_t row = p->first + i, n = least(PIECE, r->inner - b * PIECE);
            to->scales[row * blocks + b] = scale;
            if (to->e5m2)
                store_row(x + i * width + b * PIECE, n, scale, 1, to->values + row * r->inner + b * PIECE);
            else
                store_row(x + i * width + b * PIECE, n, scale, 0, to->values + row * r->inner + b * PIECE);
        }
    }
}

static inline void transpose_16(__m128i *x) {
    __m128i y[16];
#define TURN(from, to, kind)                                                                                   \
    for (int i = 0; i < 8; i++)                                                                                \
        to[2 * i] = _mm_unpacklo_##kind(from[i], from[i + 8]), to[2 * i + 1] = _mm_unpackhi_##kind(from[i], from[i + 8]);
    // Four times the same perfect shuffle of 256 bytes.
    TURN(x, y, epi8) TURN(y, x, epi8) TURN(x, y, epi8) TURN(y, x, epi8)
#undef TURN
}

static inline __attribute__((always_inline)) void store_columns(const Rounding *r, const Piece *p, const float *x,
                                                                int64_t width, const float *scales, const int e5m2) {
    int64_t inner = r->pieces * PIECE;
    for (int64_t c = 0; c < r->inner; c += LANES) {
        __m512 scale = _mm512_load_ps(scales + c);
        uint8_t *to = r->along_tokens.values + c * inner + p->index * PIECE;
        for (int64_t row = 0; row < PIECE; row += LANES) {
            __m128i bytes[LANES];
            for (int64_t i = 0; i < LANES; i++)
                bytes[i] = row + i < p->count ? to_fp8(_mm512_load_ps(x + (row + i) * width + c), scale, e5m2)
                                              : _mm_setzero_si128();
            transpose_16(bytes);
            for (int64_t i = 0; i < least(LANES, r->inner - c); i++)
                _mm_storeu_si128((__m128i *)(to + i * inner + row), bytes[i]);
        }
    }
}

// magnitudes, scales: room for (width).
static void round_along_tokens(const Rounding *r, const Piece *p, const float *x, int64_t width, int32_t *magnitudes,
                               float *scales) {
    const Layout *to = &r->along_tokens;
    int32_t all = 0;
    if (to->shared == ROW)
        memcpy(magnitudes, r->largest + p->group * r->inner, sizeof(int32_t) * r->inner);
    else if (to->shared == TENSOR)
        all = largest_of(r->largest + p->group * r->inner, r->inner);
    else
        for (int64_t c = 0; c < width; c += LANES) {
            __m512i largest = _mm512_setzero_si512();
            for (int64_t i = 0; i < p->count; i++) largest = larger(largest, _mm512_load_ps(x + i * width + c));
            _mm512_store_si512(magnitudes + c, largest);
        }
    for (int64_t c = 0; c < r->inner; c++) {
        if (to->shared == BLOCK_OF && c % PIECE == 0) all = largest_of(magnitudes + c, least(PIECE, r->inner - c));
        int32_t largest = to->shared == TILE || to->shared == ROW ? magnitudes[c] : all;
        scales[c] = scale_of(largest, to->e5m2, to->power_of_two);
        to->scales[c * r->pieces + p->index] = scales[c];
    }
    for (int64_t c = r->inner; c < width; c++) scales[c] = 1.0f;
    if (to->e5m2)
        store_columns(r, p, x, width, scales, 1);
    else
        store_columns(r, p, x, width, scales, 0);
}

// What belongs to no group, and where groups end.
static void finish(const Rounding *r, int64_t end) {
    int64_t blocks = pieces_of(r->inner), start = 0, before = 0;
    if (r->along_rows.shared) {
        memset(r->along_rows.values + end * r->inner, 0, (r->rows - end) * r->inner);
        for (int64_t i = end * blocks; i < r->rows * blocks; i++) r->along_rows.scales[i] = 1.0f;
    }
    for (int64_t group = 0; group < r->groups && r->along_tokens.shared; group++) {
        before += pieces_of(r->ends[group] - start), start = r->ends[group];
        r->piece_ends[group] = (int32_t)before;
    }
}

void fp8_round(const Rounding *r) {
    int64_t width = up(r->inner, LANES), index;
    Scratch scratch = {0};
    float *x = take(&scratch, sizeof(float) * PIECE * width), *scales = take(&scratch, sizeof(float) * width);
    int32_t *magnitudes = take(&scratch, sizeof(int32_t) * PIECE * pieces_of(r->inner));
    Piece piece;
    while (!scratch.missing) {
        index = __atomic_fetch_add(r->next, 1, __ATOMIC_RELAXED);
        if (!find_piece(r, index, &piece)) {
            if (index == piece.index) finish(r, piece.first);
            break;
        }
        widen(r, piece.first, piece.count, 0, r->inner, x, width);
        if (r->along_rows.shared) round_along_rows(r, &piece, x, width, magnitudes);
        if (r->along_tokens.shared) round_along_tokens(r, &piece, x, width, magnitudes, scales);
    }
    if (let_go(&scratch)) r->next[1] = 1;
}

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
