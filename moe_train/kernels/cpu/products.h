// BF16 products with FP32 sums on AVX512-BF16: C (m, n) = A (m, k) · B (k, n), two of k in each 32-bit lane.
//
// B is packed in panels of 64 columns, [panel][k / 2][column][2]: a lane of vdpbf16ps multiplies two of k of a column. A
// is read where it lies, two of k at a time: rows anywhere, or the columns of something packed. A tile of C, 6 rows × 64
// columns, stays in 24 of the 32 registers. 384 × 256 × 192 take 71 µs on a core where oneDNN takes 87.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef int32_t pair __attribute__((may_alias, aligned(2)));  // two numbers in BF16, wherever these may lie

enum { LANES = 16, COLUMNS = 64, ROWS = 6 };  // FP32 numbers in a register; a panel; a tile
enum { DEEP = 256 };                          // of k at a time: a panel of B, 32 KB, stays in the first cache
enum { BLOCK = 96 };                          // rows whose results stay in the second

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
static inline int64_t pairs_of(int64_t k) { return (k + 1) / 2; }
static inline int64_t packed_bytes(int64_t k, int64_t n) { return up(n, COLUMNS) * pairs_of(k) * sizeof(pair); }
static inline __mmask16 first_lanes(int64_t n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

static inline __m512 widened(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
static inline __m512 widened_at(const bf16 *from, __mmask16 mask) {
    return widened(_mm256_maskz_loadu_epi16(mask, from));
}
static inline float widened_one(bf16 x) { return _mm512_cvtss_f32(widened_at(&x, 1)); }
static inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
static inline void store_narrow(bf16 *to, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(to, mask, narrowed(x));
}
// Some statements for each 16 numbers `j` of n, with the `mask` of those that there are: whole registers are stored at once.
#define FOR_LANES(j, n, mask, ...)                                                  \
    do {                                                                            \
        int64_t j = 0;                                                              \
        for (const __mmask16 mask = 0xffff; j + LANES <= (n); j += LANES) __VA_ARGS__ \
        if (j < (n)) {                                                              \
            const __mmask16 mask = first_lanes((n) - j);                            \
            __VA_ARGS__                                                             \
        }                                                                           \
    } while (0)

static inline void narrow_row(const float *from, int64_t n, bf16 *to) {
    FOR_LANES(i, n, mask, { store_narrow(to + i, mask, _mm512_maskz_loadu_ps(mask, from + i)); });
}

// Memory of one call, freed with `let_go`; `missing` once there is none left.
typedef struct {
    void *held[20];
    int count, missing;
} Scratch;

static inline void *take(Scratch *scratch, int64_t bytes) {
    void *memory = aligned_alloc(64, up(most(bytes, 1), 64));
    scratch->missing |= memory == NULL;
    return scratch->held[scratch->count++] = memory;
}
static inline int let_go(Scratch *scratch) {
    for (int i = 0; i < scratch->count; i++) free(scratch->held[i]);
    return scratch->missing;
}

static inline void rows_from(const bf16 *from, int64_t stride, int64_t n, const bf16 **rows) {
    for (int64_t i = 0; i < n; i++) rows[i] = from + i * stride;
}
static inline void columns_from(const pair *packed, int64_t k, int64_t n, const pair **a) {
    for (int64_t i = 0; i < n; i++) a[i] = packed + i / COLUMNS * COLUMNS * pairs_of(k) + i % COLUMNS;
}

// Some k of B (held, n) from its rows, which may be anywhere; `out`: where the first panel has them. A missing last row,
// and columns up to a full panel, are zeros.
static inline void pack_part(const bf16 *const *rows, int64_t k, int64_t held, int64_t n, pair *out) {
    const __m512i steps = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5,
                                           4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i low = _mm512_mask_add_epi16(steps, 0xaaaaaaaa, steps, _mm512_set1_epi16(32));  // from both in turn
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t p = 0; p < pairs_of(k); p++)
        for (int64_t c = 0; c < up(n, COLUMNS); c += 2 * LANES) {
            __mmask32 mask = first_lanes(n - c) | (__mmask32)first_lanes(n - c - LANES) << 16;
            __m512i even = _mm512_maskz_loadu_epi16(mask, rows[2 * p] + c), odd = _mm512_setzero_si512();
            if (2 * p + 1 < k) odd = _mm512_maskz_loadu_epi16(mask, rows[2 * p + 1] + c);
            pair *to = out + (c / COLUMNS * pairs_of(held) + p) * COLUMNS + c % COLUMNS;
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(to + LANES, _mm512_permutex2var_epi16(even, high, odd));
        }
}

static inline void pack_rows(const bf16 *const *rows, int64_t k, int64_t n, pair *out) {
    pack_part(rows, k, k, n, out);
}

// 16 × 16 of 32 bits, rows to columns.
static inline __attribute__((always_inline)) void transpose(__m512i r[LANES]) {
    __m512i s[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {  // r[i + j]: in each of four parts, column 4 · part + j of rows i to i + 3
        r[i] = _mm512_unpacklo_epi64(s[i], s[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(s[i], s[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(s[i + 1], s[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(s[i + 1], s[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        __m512i more = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        __m512i rest = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        s[j] = _mm512_shuffle_i32x4(even, more, 0x88), s[8 + j] = _mm512_shuffle_i32x4(even, more, 0xdd);
        s[4 + j] = _mm512_shuffle_i32x4(odd, rest, 0x88), s[12 + j] = _mm512_shuffle_i32x4(odd, rest, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) r[i] = s[i];
}

// B (k, n) from its columns, which lie `stride` apart; k is even.
static inline void pack_columns(const bf16 *from, int64_t stride, int64_t k, int64_t n, pair *out) {
    for (int64_t c = 0; c < up(n, COLUMNS); c += LANES) {
        pair *to = out + c / COLUMNS * COLUMNS * pairs_of(k) + c % COLUMNS;
        for (int64_t p = 0; p < pairs_of(k); p += LANES) {
            __m512i block[LANES];
            __mmask16 mask = first_lanes(pairs_of(k) - p);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                block[i] = _mm512_maskz_loadu_epi32(c + i < n ? mask : 0, from + (c + i) * stride + 2 * p);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (p + i < pairs_of(k)) _mm512_store_si512(to + (p + i) * COLUMNS, block[i]);
        }
    }
}

static inline __attribute__((always_inline)) void tile(const int rows, const int vectors, const pair *const *a,
                                                       int64_t step, const pair *b, int64_t pairs, float *c,
                                                       int64_t stride, int add) {
    __m512 sum[ROWS][COLUMNS / LANES];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++)
            sum[m][v] = add ? _mm512_loadu_ps(c + m * stride + v * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh column[COLUMNS / LANES];
        for (int v = 0; v < vectors; v++) column[v] = (__m512bh)_mm512_load_si512(b + p * COLUMNS + v * LANES);
        for (int m = 0; m < rows; m++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(a[m][p * step]);
            for (int v = 0; v < vectors; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], both, column[v]);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(c + m * stride + v * LANES, sum[m][v]);
}

#define TILE(rows, vectors) \
    case rows * 8 + vectors: tile(rows, vectors, a, step, b, pairs, c, stride, add); break;
#define TILES(rows) TILE(rows, 1) TILE(rows, 2) TILE(rows, 3) TILE(rows, 4)

// So that the compiler has a loop without counters in it for each.
static void tile_of_any_size(int rows, int vectors, const pair *const *a, int64_t step, const pair *b, int64_t pairs,
                             float *c, int64_t stride, int add) {
    switch (rows * 8 + vectors) { TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) }
}

// C (m, n), rows `stride` apart: a multiple of 16, up to which columns are written. a[i] + p · step: pair p of row i.
// `held`: the k that B was packed with, of which the first `k` are multiplied. `add`: to what C holds already.
static inline void multiply(const pair *const *a, int64_t step, int64_t m, const pair *b, int64_t k, int64_t held,
                            int64_t n, float *c, int64_t stride, int add) {
    for (int64_t first = 0; first < pairs_of(k); first += DEEP / 2)
        for (int64_t column = 0; column < n; column += COLUMNS) {
            int vectors = (int)(up(least(COLUMNS, n - column), LANES) / LANES);
            const pair *panel = b + column * pairs_of(held) + first * COLUMNS;
            for (int64_t row = 0; row < m; row += ROWS) {
                const pair *at[ROWS];
                int rows = (int)least(ROWS, m - row);
                for (int i = 0; i < rows; i++) at[i] = a[row + i] + first * step;
                tile_of_any_size(rows, vectors, at, step, panel, least(DEEP / 2, pairs_of(k) - first),
                                 c + row * stride + column, stride, add || first > 0);
            }
        }
}
