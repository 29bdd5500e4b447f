// Products of FP8 operands on BF16 units, exact but for their FP32 sums: after 128 of the inner dimension, or fewer, a sum
// is multiplied by the scales of its row and its column, as Hopper does (arXiv 2412.19437, section 3.3.2).
//
// Cores take slices of a group's rows, or blocks of its weight's gradient, from a common count: their results are the
// same whoever takes them. next[1] becomes 1 where memory was missing.
#include "fp8_numbers.h"

enum { WIDE = 256 };        // columns whose part of an operand stays in the second cache
enum { HIGH = 11 * ROWS };  // rows of a block of a weight's gradient

// Rows of numbers that follow one another, with a scale for each 128 of them.
typedef struct {
    const uint8_t *values;
    const float *scales;
    int64_t stride, scale_stride, scale_step, e5m2;
} Operand;

typedef struct {
    int64_t groups, rows, inner, outer, slices, narrow;  // e; n, k and o of the forward product; whether `out` is BF16
    int64_t *next;
    const int32_t *ends;                 // (e): where a group's rows end, or its pieces
    Operand left, right;                 // of the first group
    int64_t right_group, scales_group;   // how far those of the next one are
    void *out;
} Product;

static Operand rows_at(const Operand *from, int64_t row, int64_t piece) {
    Operand part = *from;
    part.values += row * from->stride + piece * PIECE;
    part.scales += row * from->scale_stride + piece * from->scale_step;
    return part;
}

// `count` rows (k) in BF16, `stride` apart, with zeros up to an even number.
static void decode(const Operand *from, int64_t count, int64_t k, bf16 *to, int64_t stride) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < k; j += 2 * LANES) {
            __m256i bytes = _mm256_maskz_loadu_epi8(first_of_32(k - j), from->values + i * from->stride + j);
            __m512i x = from->e5m2 ? from_fp8(bytes, 1) : from_fp8(bytes, 0);
            _mm512_mask_storeu_epi16(to + i * stride + j, first_of_32(stride - j), x);
        }
}

// 4 of each of 16 rows, of which `left` are there.
static inline __m512i four_of_16(const uint8_t *from, int64_t stride, int64_t rows, int64_t left) {
    if (left >= 4) {
        const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i apart = _mm512_mullo_epi32(count, _mm512_set1_epi32((int)stride));
        return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), first_lanes(rows), apart, (const int *)from, 1);
    }
    uint32_t four[LANES] = {0};
    for (int64_t i = 0; i < least(LANES, rows); i++) memcpy(four + i, from + i * stride, left);
    return _mm512_loadu_si512(four);
}

// B (k, n) as in products.h, from its columns, and their scales (⌈k / 128⌉, WIDE).
static void pack(const Operand *from, int64_t k, int64_t n, pair *packed, float *scales) {
    for (int64_t c = 0; c < up(n, COLUMNS); c += LANES)
        for (int64_t j = 0; j < k; j += 4) {
            __m512i four = n > c ? four_of_16(from->values + c * from->stride + j, from->stride, n - c, k - j)
                                 : _mm512_setzero_si512();
            for (int64_t p = j / 2; p < least(j / 2 + 2, pairs_of(k)); p++, four = _mm512_srli_epi32(four, 16)) {
                __m256i bytes = _mm512_cvtepi32_epi16(four);
                __m512i x = from->e5m2 ? from_fp8(bytes, 1) : from_fp8(bytes, 0);
                _mm512_store_si512(packed + (c / COLUMNS * pairs_of(k) + p) * COLUMNS + c % COLUMNS, x);
            }
        }
    for (int64_t piece = 0; piece < pieces_of(k); piece++)
        for (int64_t c = 0; c < up(n, LANES); c++)
            scales[piece * WIDE + c] = c < n ? from->scales[c * from->scale_stride + piece * from->scale_step] : 0.0f;
}

// C (m, n), rows WIDE apart: A, whose rows are `stride` apart, by packed B. `add`: to what C holds already.
static void multiply_scaled(const bf16 *a, int64_t stride, const Operand *left, int64_t m, const pair *b,
                            const float *scales, int64_t k, int64_t n, float *c, int add) {
    float sums[ROWS * COLUMNS] __attribute__((aligned(64)));
    for (int64_t piece = 0; piece < pieces_of(k); piece++)
        for (int64_t column = 0; column < n; column += COLUMNS) {
            int vectors = (int)(up(least(COLUMNS, n - column), LANES) / LANES);
            const pair *panel = b + column * pairs_of(k) + piece * PIECE / 2 * COLUMNS;
            __m512 across[COLUMNS / LANES];
            for (int v = 0; v < vectors; v++) across[v] = _mm512_loadu_ps(scales + piece * WIDE + column + v * LANES);
            for (int64_t row = 0; row < m; row += ROWS) {
                const pair *at[ROWS];
                int rows = (int)least(ROWS, m - row);
                for (int i = 0; i < rows; i++) at[i] = (const pair *)(a + (row + i) * stride) + piece * PIECE / 2;
                tile_of_any_size(rows, vectors, at, 1, panel, least(PIECE / 2, pairs_of(k) - piece * PIECE / 2), sums,
                                 COLUMNS, 0);
                for (int i = 0; i < rows; i++) {
                    __m512 own = _mm512_set1_ps(left->scales[(row + i) * left->scale_stride + piece * left->scale_step]);
                    float *to = c + (row + i) * WIDE + column;
                    for (int v = 0; v < vectors; v++) {
                        __m512 sum = _mm512_load_ps(sums + i * COLUMNS + v * LANES), scale = _mm512_mul_ps(own, across[v]);
                        __m512 before = add || piece ? _mm512_loadu_ps(to + v * LANES) : _mm512_setzero_ps();
                        _mm512_storeu_ps(to + v * LANES, _mm512_fmadd_ps(sum, scale, before));
                    }
                }
            }
        }
}

void fp8_product(const Product *p) {
    int64_t k = p->inner, o = p->outer, stride = up(k, 2), unit;
    int64_t size = p->narrow ? sizeof(bf16) : sizeof(float);
    Scratch scratch = {0};
    pair *packed = take(&scratch, packed_bytes(k, WIDE));
    float *scales = take(&scratch, sizeof(float) * pieces_of(k) * WIDE);
    float *sums = take(&scratch, sizeof(float) * BLOCK * WIDE);
    bf16 *a = take(&scratch, sizeof(bf16) * BLOCK * stride);
    while (!scratch.missing && (unit = __atomic_fetch_add(p->next, 1, __ATOMIC_RELAXED)) <= p->groups * p->slices) {
        int64_t group = unit / p->slices, slice = unit % p->slices, before = group ? p->ends[group - 1] : 0;
        if (group == p->groups) {  // what comes after the last group
            memset((char *)p->out + before * o * size, 0, (p->rows - before) * o * size);
            break;
        }
        int64_t count = p->ends[group] - before, first = before + count * slice / p->slices;
        int64_t end = before + count * (slice + 1) / p->slices;
        for (int64_t column = 0; column < o && first < end; column += WIDE) {
            int64_t some = least(WIDE, o - column);
            Operand right = p->right;
            right.values += group * p->right_group, right.scales += group * p->scales_group;
            right = rows_at(&right, column, 0);
            pack(&right, k, some, packed, scales);
            for (int64_t row = first; row < end; row += BLOCK) {
                int64_t rows = least(BLOCK, end - row);
                Operand left = rows_at(&p->left, row, 0);
                decode(&left, rows, k, a, stride);
                multiply_scaled(a, stride, &left, rows, packed, scales, k, some, sums, 0);
                for (int64_t i = 0; i < rows; i++) {
                    int64_t at = (row + i) * o + column;
                    if (p->narrow)
                        narrow_row(sums + i * WIDE, some, (bf16 *)p->out + at);
                    else
                        memcpy((float *)p->out + at, sums + i * WIDE, sizeof(float) * some);
                }
            }
        }
    }
    if (let_go(&scratch)) p->next[1] = 1;
}

// For each group left (o, tokens) by right (i, tokens), o and i being `rows` and `outer`: (e, o, i) in FP32.
void fp8_weight_product(const Product *p) {
    int64_t high = (p->rows + HIGH - 1) / HIGH, across = (p->outer + WIDE - 1) / WIDE, unit;
    Scratch scratch = {0};
    pair *packed = take(&scratch, packed_bytes(PIECE, WIDE));
    float *scales = take(&scratch, sizeof(float) * WIDE), *sums = take(&scratch, sizeof(float) * HIGH * WIDE);
    bf16 *a = take(&scratch, sizeof(bf16) * HIGH * PIECE);
    while (!scratch.missing &&
           (unit = __atomic_fetch_add(p->next, 1, __ATOMIC_RELAXED)) < p->groups * high * across) {
        int64_t group = unit / (high * across), row = unit / across % high * HIGH, column = unit % across * WIDE;
        int64_t rows = least(HIGH, p->rows - row), some = least(WIDE, p->outer - column);
        int64_t first = group ? p->ends[group - 1] : 0, end = p->ends[group];
        float *out = (float *)p->out + (group * p->rows + row) * p->outer + column;
        if (first == end) memset(sums, 0, sizeof(float) * HIGH * WIDE);
        for (int64_t piece = first; piece < end; piece++) {
            Operand left = rows_at(&p->left, row, piece), right = rows_at(&p->right, column, piece);
            decode(&left, rows, PIECE, a, PIECE);
            pack(&right, PIECE, some, packed, scales);
            multiply_scaled(a, PIECE, &left, rows, packed, scales, PIECE, some, sums, piece > first);
        }
        for (int64_t i = 0; i < rows; i++) memcpy(out + i * p->outer, sums + i * WIDE, sizeof(float) * some);
    }
    if (let_go(&scratch)) p->next[1] = 1;
}
