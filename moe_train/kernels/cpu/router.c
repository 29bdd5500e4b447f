// The router's linear layer in FP32, and both gradients. MKL multiplies at two fifths of what AVX-512 can do on an AMD
// processor, and with 256 experts the router was a tenth of a step.
#include "products.h"

enum { WIDE = 256, DEEP_WIDE = 128 };  // columns at a time; of k, so that a panel, 32 KB, stays in the first cache

typedef struct {
    int64_t rows, inner, outer, parts;  // t, d, e; the parts that rows are cut in, whatever the number of cores
    int64_t *next;                      // part
    const float *x, *weight;            // (t, d), (e, d)
    float *y;                           // (t, e)
    const float *grad_y;
    float *grad_x, *grad_weight;  // (t, d); (parts, e, d), to be added up
} Router;

// B (k, n) in panels [panel][k][column], from its rows or from its columns, `stride` apart; zeros up to a full panel.
static void pack_rows_wide(const float *from, int64_t stride, int64_t k, int64_t n, float *out) {
    for (int64_t p = 0; p < k; p++)
        for (int64_t c = 0; c < up(n, COLUMNS); c += LANES)
            _mm512_store_ps(out + (c / COLUMNS * k + p) * COLUMNS + c % COLUMNS,
                            _mm512_maskz_loadu_ps(first_lanes(n - c), from + p * stride + c));
}
static void pack_columns_wide(const float *from, int64_t stride, int64_t k, int64_t n, float *out) {
    const __m512i count = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i apart = _mm512_mullo_epi32(count, _mm512_set1_epi32((int)stride));
    for (int64_t c = 0; c < up(n, COLUMNS); c += LANES)
        for (int64_t p = 0; p < k; p++)
            _mm512_store_ps(out + (c / COLUMNS * k + p) * COLUMNS + c % COLUMNS,
                            _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(n - c), apart,
                                                     from + c * stride + p, sizeof(float)));
}

static inline __attribute__((always_inline)) void tile_wide(const int rows, const float *const *a, int64_t step,
                                                            const float *b, int64_t k, float *c, int add) {
    __m512 sum[ROWS][COLUMNS / LANES];
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < COLUMNS / LANES; v++)
            sum[m][v] = add ? _mm512_loadu_ps(c + m * WIDE + v * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < k; p++) {
        __m512 column[COLUMNS / LANES];
        for (int v = 0; v < COLUMNS / LANES; v++) column[v] = _mm512_load_ps(b + p * COLUMNS + v * LANES);
        for (int m = 0; m < rows; m++) {
            __m512 one = _mm512_set1_ps(a[m][p * step]);
            for (int v = 0; v < COLUMNS / LANES; v++) sum[m][v] = _mm512_fmadd_ps(one, column[v], sum[m][v]);
        }
    }
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < COLUMNS / LANES; v++) _mm512_storeu_ps(c + m * WIDE + v * LANES, sum[m][v]);
}

// As `multiply` of products.h. Rows of C are WIDE apart and written to the end of a panel; `add`: to what C holds.
static void multiply_wide(const float *const *a, int64_t step, int64_t m, const float *b, int64_t k, int64_t n, float *c,
                          int add) {
    for (int64_t first = 0; first < k; first += DEEP_WIDE)
        for (int64_t column = 0; column < n; column += COLUMNS)
            for (int64_t row = 0; row < m; row += ROWS) {
                const float *at[ROWS], *panel = b + column * k + first * COLUMNS;
                int64_t some = least(DEEP_WIDE, k - first);
                float *to = c + row * WIDE + column;
                for (int i = 0; i < least(ROWS, m - row); i++) at[i] = a[row + i] + first * step;
                switch (least(ROWS, m - row)) {
                    case 1: tile_wide(1, at, step, panel, some, to, add || first); break;
                    case 2: tile_wide(2, at, step, panel, some, to, add || first); break;
                    case 3: tile_wide(3, at, step, panel, some, to, add || first); break;
                    case 4: tile_wide(4, at, step, panel, some, to, add || first); break;
                    case 5: tile_wide(5, at, step, panel, some, to, add || first); break;
                    default: tile_wide(6, at, step, panel, some, to, add || first);
                }
            }
}

// Rows `first` to `end` of `from` (t, k) by packed columns, some of n.
static void rows_by_wide(const float *from, int64_t first, int64_t end, int64_t k, const float *packed, int64_t column,
                         int64_t some, int64_t n, float *sums, float *to) {
    const float *a[BLOCK];
    for (int64_t row = first; row < end; row += BLOCK) {
        int64_t count = least(BLOCK, end - row);
        for (int64_t i = 0; i < count; i++) a[i] = from + (row + i) * k;
        multiply_wide(a, 1, count, packed, k, some, sums, 0);
        for (int64_t i = 0; i < count; i++)
            memcpy(to + (row + i) * n + column, sums + i * WIDE, sizeof(float) * some);
    }
}

void router_forward(const Router *r) {
    Scratch scratch = {0};
    float *packed = take(&scratch, sizeof(float) * r->inner * WIDE), *sums = take(&scratch, sizeof(float) * BLOCK * WIDE);
    int64_t part;
    while (!scratch.missing && (part = __atomic_fetch_add(r->next, 1, __ATOMIC_RELAXED)) < r->parts)
        for (int64_t column = 0; column < r->outer; column += WIDE) {
            int64_t some = least(WIDE, r->outer - column);
            pack_columns_wide(r->weight + column * r->inner, r->inner, r->inner, some, packed);
            rows_by_wide(r->x, r->rows * part / r->parts, r->rows * (part + 1) / r->parts, r->inner, packed, column, some,
                         r->outer, sums, r->y);
        }
    if (let_go(&scratch)) r->next[1] = 1;
}

void router_input_gradient(const Router *r) {
    Scratch scratch = {0};
    float *packed = take(&scratch, sizeof(float) * r->outer * WIDE), *sums = take(&scratch, sizeof(float) * BLOCK * WIDE);
    int64_t part;
    while (!scratch.missing && (part = __atomic_fetch_add(r->next, 1, __ATOMIC_RELAXED)) < r->parts)
        for (int64_t column = 0; column < r->inner; column += WIDE) {
            int64_t some = least(WIDE, r->inner - column);
            pack_rows_wide(r->weight + column, r->inner, r->outer, some, packed);
            rows_by_wide(r->grad_y, r->rows * part / r->parts, r->rows * (part + 1) / r->parts, r->outer, packed, column,
                         some, r->inner, sums, r->grad_x);
        }
    if (let_go(&scratch)) r->next[1] = 1;
}

void router_weight_gradient(const Router *r) {
    Scratch scratch = {0};
    float *packed = take(&scratch, sizeof(float) * DEEP_WIDE * WIDE);
    float *sums = take(&scratch, sizeof(float) * r->outer * WIDE);
    const float **a = take(&scratch, sizeof(float *) * r->outer);
    int64_t part;
    while (!scratch.missing && (part = __atomic_fetch_add(r->next, 1, __ATOMIC_RELAXED)) < r->parts) {
        int64_t first = r->rows * part / r->parts, end = r->rows * (part + 1) / r->parts;
        float *to = r->grad_weight + part * r->outer * r->inner;
        for (int64_t column = 0; column < r->inner; column += WIDE) {
            int64_t some = least(WIDE, r->inner - column);
            memset(sums, 0, sizeof(float) * r->outer * WIDE);
            for (int64_t row = first; row < end; row += DEEP_WIDE) {
                int64_t count = least(DEEP_WIDE, end - row);
                pack_rows_wide(r->x + row * r->inner + column, r->inner, count, some, packed);
                for (int64_t e = 0; e < r->outer; e++) a[e] = r->grad_y + row * r->outer + e;
                multiply_wide(a, r->outer, r->outer, packed, count, some, sums, 1);
            }
            for (int64_t e = 0; e < r->outer; e++)
                memcpy(to + e * r->inner + column, sums + e * WIDE, sizeof(float) * some);
        }
    }
    if (let_go(&scratch)) r->next[1] = 1;
}
