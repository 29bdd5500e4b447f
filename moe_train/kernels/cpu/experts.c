// Routed experts on a CPU, an expert at a time from its tokens to its results, so that what lies between two products
// stays in the cache of a core.
//
//     z (n, 2f) = x · first^T        h = silu(gate) · up · weight of the row        y = h · second^T
//
// An expert's rows are tokens anywhere in x. Cores take the next expert of `order` from a common count; its results are
// the same whoever takes it. next[1] becomes 1 where memory was missing.
#include "activation.h"
#include "products.h"

typedef struct {
    int64_t experts, hidden, width;  // e, d, f
    int64_t shared;                  // all have the weights of the first; gradients are of each
    const bf16 *x;                   // (t, d)
    const int64_t *token;            // (n): whose row it is
    const float *first, *second;     // (e, 2f, d), (e, d, f)
    const bf16 *weight;              // (n)
    const int32_t *ends, *order;     // (e): where an expert's rows end; the experts, the fullest first
    int64_t *next;                   // place in `order`
    bf16 *gate_up;                   // z: written forward, read backward
    bf16 *y;                         // (n, d)
    // Backward alone:
    const bf16 *grad_y;              // (t, d)
    bf16 *grad_x;                    // (n, d)
    float *grad_first, *grad_second;
    bf16 *grad_weight;
} Experts;

static int next_expert(const Experts *e, int64_t *start, int64_t *end) {
    int64_t place = __atomic_fetch_add(e->next, 1, __ATOMIC_RELAXED);
    if (place >= e->experts) return -1;
    int expert = e->order[place];
    *start = expert ? e->ends[expert - 1] : 0, *end = e->ends[expert];
    return expert;
}

// Rows anywhere, on their way to the second cache while others are multiplied.
static void fetch(const bf16 *from, const int64_t *token, int64_t first, int64_t end, int64_t width) {
    for (int64_t row = first; row < end; row++)
        for (int64_t j = 0; j < width; j += 32) _mm_prefetch((const char *)(from + token[row] * width + j), _MM_HINT_T1);
}

// A row of z, rounded, and its h, made of the rounded numbers.
static void activate(const float *sums, bf16 row_weight, int64_t f, bf16 *z, bf16 *h) {
    const __m512 weight = _mm512_set1_ps(widened_one(row_weight));
    FOR_LANES(j, f, mask, {
        __m256i first = narrowed(_mm512_maskz_loadu_ps(mask, sums + j));
        __m256i second = narrowed(_mm512_maskz_loadu_ps(mask, sums + f + j));
        _mm256_mask_storeu_epi16(z + j, mask, first);
        _mm256_mask_storeu_epi16(z + f + j, mask, second);
        __m512 gate = widened(first), active = _mm512_mul_ps(gate, sigmoid(gate));
        store_narrow(h + j, mask, _mm512_mul_ps(_mm512_mul_ps(active, widened(second)), weight));
    });
}

void experts_forward(const Experts *e) {
    int64_t d = e->hidden, f = e->width, wide = up(2 * f, LANES), out = up(d, LANES), start, end, expert, packed = 0;
    Scratch scratch = {0};
    pair *first = take(&scratch, packed_bytes(d, 2 * f)), *second = take(&scratch, packed_bytes(f, d));
    float *sums = take(&scratch, sizeof(float) * BLOCK * most(wide, out));
    bf16 *h = take(&scratch, sizeof(bf16) * BLOCK * f), *narrow = take(&scratch, sizeof(bf16) * 2 * f * d);
    while (!scratch.missing && (expert = next_expert(e, &start, &end)) >= 0) {
        if (start == end) continue;
        if (!e->shared || !packed) {
            int64_t own = e->shared ? 0 : expert;
            narrow_row(e->first + own * 2 * f * d, 2 * f * d, narrow);
            pack_columns(narrow, d, d, 2 * f, first);
            narrow_row(e->second + own * d * f, d * f, narrow);
            pack_columns(narrow, f, f, d, second);
            packed = 1;
        }
        for (int64_t row = start; row < end; row += BLOCK) {
            int64_t rows = least(BLOCK, end - row);
            const pair *a[BLOCK];
            for (int64_t i = 0; i < rows; i++) a[i] = (const pair *)(e->x + e->token[row + i] * d);
            fetch(e->x, e->token, row + rows, least(row + rows + BLOCK, e->ends[e->experts - 1]), d);
            multiply(a, 1, rows, first, d, d, 2 * f, sums, wide, 0);
            for (int64_t i = 0; i < rows; i++) {
                activate(sums + i * wide, e->weight[row + i], f, e->gate_up + (row + i) * 2 * f, h + i * f);
                a[i] = (const pair *)(h + i * f);
            }
            multiply(a, 1, rows, second, f, f, d, sums, out, 0);
            for (int64_t i = 0; i < rows; i++) narrow_row(sums + i * out, d, e->y + (row + i) * d);
        }
    }
    if (let_go(&scratch)) e->next[1] = 1;
}

// From a row of z and the gradient of its h: h, the gradient of z, and that of the row's weight.
static bf16 row_gradients(const bf16 *z, const float *grad_h, bf16 row_weight, int64_t f, bf16 *h, bf16 *grad_z) {
    __m512 weight = _mm512_set1_ps(widened_one(row_weight)), one = _mm512_set1_ps(1.0f), total = _mm512_setzero_ps();
    FOR_LANES(j, f, mask, {
        __m512 gate = widened_at(z + j, mask), grad = _mm512_maskz_loadu_ps(mask, grad_h + j);
        __m512 share = sigmoid(gate), active = _mm512_mul_ps(gate, share), other = widened_at(z + f + j, mask);
        __m512 both = _mm512_mul_ps(active, other);
        __m512 slope = _mm512_fmadd_ps(active, _mm512_sub_ps(one, share), share);  // of silu
        total = _mm512_fmadd_ps(grad, both, total);
        grad = _mm512_mul_ps(grad, weight);
        store_narrow(h + j, mask, _mm512_mul_ps(both, weight));
        store_narrow(grad_z + j, mask, _mm512_mul_ps(_mm512_mul_ps(grad, other), slope));
        store_narrow(grad_z + f + j, mask, _mm512_mul_ps(grad, active));
    });
    bf16 sum;
    store_narrow(&sum, 1, _mm512_set1_ps(_mm512_reduce_add_ps(total)));
    return sum;
}

// Past the caches, where nothing is read of what it replaces: a gradient is not read again before all of them are there.
static void put_row(const float *from, int64_t n, float *to) {
    if ((uintptr_t)to % 64 || n % LANES)
        memcpy(to, from, sizeof(float) * n);
    else
        for (int64_t i = 0; i < n; i += LANES) _mm512_stream_ps(to + i, _mm512_load_ps(from + i));
}

void experts_backward(const Experts *e) {
    int64_t d = e->hidden, f = e->width, narrow_f = up(f, LANES), out = up(d, LANES), start, end, expert;
    int64_t longest = most(most(d, 2 * f), DEEP), packed = 0;
    Scratch scratch = {0};
    pair *first = take(&scratch, packed_bytes(2 * f, d)), *second = take(&scratch, packed_bytes(d, f));
    pair *x = take(&scratch, packed_bytes(DEEP, d)), *grad_y = take(&scratch, packed_bytes(DEEP, d));
    pair *packed_h = take(&scratch, packed_bytes(DEEP, f)), *packed_z = take(&scratch, packed_bytes(DEEP, 2 * f));
    float *sum_first = take(&scratch, sizeof(float) * 2 * f * out);
    float *sum_second = take(&scratch, sizeof(float) * d * narrow_f);
    float *grad_h = take(&scratch, sizeof(float) * DEEP * narrow_f), *sums = take(&scratch, sizeof(float) * BLOCK * out);
    bf16 *h = take(&scratch, sizeof(bf16) * DEEP * f), *grad_z = take(&scratch, sizeof(bf16) * DEEP * 2 * f);
    bf16 *narrow = take(&scratch, sizeof(bf16) * 2 * f * d);
    const pair **a = take(&scratch, sizeof(pair *) * longest);
    const bf16 **at = take(&scratch, sizeof(bf16 *) * longest);
    while (!scratch.missing && (expert = next_expert(e, &start, &end)) >= 0) {
        if (!e->shared || !packed) {
            int64_t own = e->shared ? 0 : expert;
            narrow_row(e->first + own * 2 * f * d, 2 * f * d, narrow);
            rows_from(narrow, d, 2 * f, at), pack_rows(at, 2 * f, d, first);
            narrow_row(e->second + own * d * f, d * f, narrow);
            rows_from(narrow, f, d, at), pack_rows(at, d, f, second);
            packed = 1;
        }
        for (int64_t row = start; row < end; row += DEEP) {
            int64_t rows = least(DEEP, end - row);
            for (int64_t i = 0; i < rows; i++) a[i] = (const pair *)(at[i] = e->grad_y + e->token[row + i] * d);
            fetch(e->x, e->token, row, row + rows, d);
            multiply(a, 1, rows, second, d, d, f, grad_h, narrow_f, 0);
            pack_rows(at, rows, d, grad_y);
            for (int64_t i = 0; i < rows; i++)
                e->grad_weight[row + i] = row_gradients(e->gate_up + (row + i) * 2 * f, grad_h + i * narrow_f,
                                                        e->weight[row + i], f, h + i * f, grad_z + i * 2 * f);
            rows_from(h, f, rows, at), pack_rows(at, rows, f, packed_h);
            columns_from(grad_y, rows, d, a);
            multiply(a, COLUMNS, d, packed_h, rows, rows, f, sum_second, narrow_f, row > start);

            rows_from(grad_z, 2 * f, rows, at), pack_rows(at, rows, 2 * f, packed_z);
            for (int64_t i = 0; i < rows; i++) at[i] = e->x + e->token[row + i] * d;
            pack_rows(at, rows, d, x);
            columns_from(packed_z, rows, 2 * f, a);
            multiply(a, COLUMNS, 2 * f, x, rows, rows, d, sum_first, out, row > start);

            fetch(e->grad_y, e->token, row + rows, least(row + rows + DEEP, end), d);
            for (int64_t part = 0; part < rows; part += BLOCK) {
                int64_t some = least(BLOCK, rows - part);
                for (int64_t i = 0; i < some; i++) a[i] = (const pair *)(grad_z + (part + i) * 2 * f);
                multiply(a, 1, some, first, 2 * f, 2 * f, d, sums, out, 0);
                for (int64_t i = 0; i < some; i++) narrow_row(sums + i * out, d, e->grad_x + (row + part + i) * d);
            }
        }
        float *grad_first = e->grad_first + expert * 2 * f * d, *grad_second = e->grad_second + expert * d * f;
        if (start == end) {
            memset(grad_first, 0, sizeof(float) * 2 * f * d), memset(grad_second, 0, sizeof(float) * d * f);
            continue;
        }
        for (int64_t i = 0; i < 2 * f; i++) put_row(sum_first + i * out, d, grad_first + i * d);
        for (int64_t i = 0; i < d; i++) put_row(sum_second + i * narrow_f, f, grad_second + i * f);
    }
    if (let_go(&scratch)) e->next[1] = 1;
}
