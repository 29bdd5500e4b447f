// Operands rounded to FP8 for products over their columns, over their rows, or both: bit for bit what
// precision/quantize.py does for every group. A piece is made FP32 once and then read from the second cache.
//
// Cores take the next piece from a common count. next[1] becomes 1 where memory was missing.
#include "fp8_source.h"

enum { NONE, TILE, BLOCK_OF, ROW, TENSOR };  // what shares a scale

typedef struct {
    int64_t shared, e5m2, power_of_two;
    uint8_t *values;
    float *scales;
} Layout;

typedef struct {
    Source source;
    int32_t *largest;                             // (e, k): magnitudes in each group, as bits, where scales need them
    int64_t pieces;                               // there is room for so many in `along_tokens`
    int32_t *piece_ends;                          // (e)
    Layout along_rows, along_tokens;              // values (n, k), scales (n, ⌈k / 128⌉); (k, 128 p), (k, p)
} Rounding;

// Largest magnitudes in each group, 64 columns at a time.
void fp8_largest(const Rounding *r) {
    const Source *s = &r->source;
    int64_t across = (s->inner + COLUMNS - 1) / COLUMNS, unit;
    Scratch scratch = {0};
    float *x = take(&scratch, sizeof(float) * PIECE * COLUMNS);
    while (!scratch.missing && (unit = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->groups * across) {
        int64_t group = unit / across, column = unit % across * COLUMNS, some = least(COLUMNS, s->inner - column);
        __m512i largest[COLUMNS / LANES] = {0};
        for (int64_t row = group ? s->ends[group - 1] : 0; row < s->ends[group]; row += PIECE) {
            int64_t count = least(PIECE, s->ends[group] - row);
            widen(s, row, count, column, some, x, COLUMNS);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < some; j += LANES)
                    largest[j / LANES] = larger(largest[j / LANES], _mm512_load_ps(x + i * COLUMNS + j));
        }
        for (int64_t j = 0; j < some; j += LANES)
            _mm512_mask_storeu_epi32(r->largest + group * s->inner + column + j, first_lanes(some - j),
                                     largest[j / LANES]);
    }
    if (let_go(&scratch)) s->next[1] = 1;
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
    const Source *s = &r->source;
    const Layout *to = &r->along_rows;
    int64_t blocks = pieces_of(s->inner);
    for (int64_t i = 0; i < p->count && to->shared != TENSOR; i++)
        for (int64_t b = 0; b < blocks; b++) {
            __m512i largest = _mm512_setzero_si512();
            for (int64_t j = b * PIECE; j < least((b + 1) * PIECE, width); j += LANES)
                largest = larger(largest, _mm512_load_ps(x + i * width + j));
            magnitudes[i * blocks + b] = _mm512_reduce_max_epu32(largest);
        }
    int32_t all = to->shared == TENSOR ? largest_of(r->largest + p->group * s->inner, s->inner) : 0;
    for (int64_t b = 0; b < blocks && to->shared == BLOCK_OF; b++)
        for (int64_t i = p->count - 1; i > 0; i--)
            magnitudes[b] = largest_of((int32_t[]){magnitudes[b], magnitudes[i * blocks + b]}, 2);
    for (int64_t i = 0; i < p->count; i++) {
        const int32_t *own = magnitudes + i * blocks;
        if (to->shared == ROW) all = largest_of(own, blocks);
        for (int64_t b = 0; b < blocks; b++) {
            int32_t largest = to->shared == TILE ? own[b] : to->shared == BLOCK_OF ? magnitudes[b] : all;
            float scale = scale_of(largest, to->e5m2, to->power_of_two);
            int64_t row = p->first + i, n = least(PIECE, s->inner - b * PIECE);
            to->scales[row * blocks + b] = scale;
            if (to->e5m2)
                store_row(x + i * width + b * PIECE, n, scale, 1, to->values + row * s->inner + b * PIECE);
            else
                store_row(x + i * width + b * PIECE, n, scale, 0, to->values + row * s->inner + b * PIECE);
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
    const Source *s = &r->source;
    int64_t inner = r->pieces * PIECE;
    for (int64_t c = 0; c < s->inner; c += LANES) {
        __m512 scale = _mm512_load_ps(scales + c);
        uint8_t *to = r->along_tokens.values + c * inner + p->index * PIECE;
        for (int64_t row = 0; row < PIECE; row += LANES) {
            __m128i bytes[LANES];
            for (int64_t i = 0; i < LANES; i++)
                bytes[i] = row + i < p->count ? to_fp8(_mm512_load_ps(x + (row + i) * width + c), scale, e5m2)
                                              : _mm_setzero_si128();
            transpose_16(bytes);
            for (int64_t i = 0; i < least(LANES, s->inner - c); i++)
                _mm_storeu_si128((__m128i *)(to + i * inner + row), bytes[i]);
        }
    }
}

// magnitudes, scales: room for (width).
static void round_along_tokens(const Rounding *r, const Piece *p, const float *x, int64_t width, int32_t *magnitudes,
                               float *scales) {
    const Source *s = &r->source;
    const Layout *to = &r->along_tokens;
    int32_t all = 0;
    if (to->shared == ROW)
        memcpy(magnitudes, r->largest + p->group * s->inner, sizeof(int32_t) * s->inner);
    else if (to->shared == TENSOR)
        all = largest_of(r->largest + p->group * s->inner, s->inner);
    else
        for (int64_t c = 0; c < width; c += LANES) {
            __m512i largest = _mm512_setzero_si512();
            for (int64_t i = 0; i < p->count; i++) largest = larger(largest, _mm512_load_ps(x + i * width + c));
            _mm512_store_si512(magnitudes + c, largest);
        }
    for (int64_t c = 0; c < s->inner; c++) {
        if (to->shared == BLOCK_OF && c % PIECE == 0) all = largest_of(magnitudes + c, least(PIECE, s->inner - c));
        int32_t largest = to->shared == TILE || to->shared == ROW ? magnitudes[c] : all;
        scales[c] = scale_of(largest, to->e5m2, to->power_of_two);
        to->scales[c * r->pieces + p->index] = scales[c];
    }
    for (int64_t c = s->inner; c < width; c++) scales[c] = 1.0f;
    if (to->e5m2)
        store_columns(r, p, x, width, scales, 1);
    else
        store_columns(r, p, x, width, scales, 0);
}

// What belongs to no group, and where groups end.
static void finish(const Rounding *r, int64_t end) {
    const Source *s = &r->source;
    int64_t blocks = pieces_of(s->inner), start = 0, before = 0;
    if (r->along_rows.shared && end < s->rows) {
        memset(r->along_rows.values + end * s->inner, 0, (s->rows - end) * s->inner);
        for (int64_t i = end * blocks; i < s->rows * blocks; i++) r->along_rows.scales[i] = 1.0f;
    }
    for (int64_t group = 0; group < s->groups && r->along_tokens.shared; group++) {
        before += pieces_of(s->ends[group] - start), start = s->ends[group];
        r->piece_ends[group] = (int32_t)before;
    }
}

void fp8_round(const Rounding *r) {
    const Source *s = &r->source;
    int64_t width = up(s->inner, LANES), index;
    Scratch scratch = {0};
    float *x = take(&scratch, sizeof(float) * PIECE * width), *scales = take(&scratch, sizeof(float) * width);
    int32_t *magnitudes = take(&scratch, sizeof(int32_t) * PIECE * pieces_of(s->inner));
    Piece piece;
    while (!scratch.missing) {
        index = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED);
        if (!find_piece(s, index, &piece)) {
            if (index == piece.index) finish(r, piece.first);
            break;
        }
        widen(s, piece.first, piece.count, 0, s->inner, x, width);
        if (r->along_rows.shared) round_along_rows(r, &piece, x, width, magnitudes);
        if (r->along_tokens.shared) round_along_tokens(r, &piece, x, width, magnitudes, scales);
    }
    if (let_go(&scratch)) s->next[1] = 1;
}
