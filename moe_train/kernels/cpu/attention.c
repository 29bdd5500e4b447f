// Causal attention on a CPU, some rows of queries at a time: their scores stay in the cache of a core and are computed
// again backward (FlashAttention, arXiv 2205.14135). Scores, softmax and its gradient are FP32; products read BF16.
//
// Cores take the next head of keys, with all heads of queries that share it, from a common count. next[1] becomes 1
// where memory was missing.
#include "activation.h"
#include "products.h"

typedef struct {
    int64_t heads, shared, length, features, values;  // n of keys, r of queries to each, t, c, c_v
    int64_t *next;                                     // head
    const bf16 *q, *k, *v;                             // (n, r, t, c), (n, t, c), (n, t, c_v)
    bf16 *out;                                         // (n, r, t, c_v)
    // Backward alone:
    const bf16 *grad_out;
    bf16 *grad_q, *grad_k, *grad_v;
    float scale;
} Attention;

enum { SCORES = 1 << 16, TALLEST = 66 };  // of some rows: 256 KB; and so many of these at most

static int64_t rows_at_once(int64_t length) {
    return least(length, most(ROWS, least(TALLEST, SCORES / up(length, COLUMNS) / ROWS * ROWS)));
}

// A row of scores becomes probabilities of its first `seen` keys, and zeros up to `end`, a multiple of 16.
static void softmax_row(float *row, int64_t seen, int64_t end, float scale, bf16 *narrow) {
    const __m512 lowest = _mm512_set1_ps(-3.4e38f), factor = _mm512_set1_ps(scale);
    __m512 top = lowest, total = _mm512_setzero_ps();
    for (int64_t j = 0; j < seen; j += LANES)
        top = _mm512_max_ps(top, _mm512_mask_mul_ps(lowest, first_lanes(seen - j), _mm512_loadu_ps(row + j), factor));
    top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    for (int64_t j = 0; j < seen; j += LANES) {
        __m512 p = exponential(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), factor, top));
        p = _mm512_maskz_mov_ps(first_lanes(seen - j), p);
        total = _mm512_add_ps(total, p);
        _mm512_storeu_ps(row + j, p);
    }
    const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (int64_t j = 0; j < end; j += LANES) {
        __m512 p = j < seen ? _mm512_mul_ps(_mm512_loadu_ps(row + j), share) : _mm512_setzero_ps();
        _mm512_storeu_ps(row + j, p);
        store_narrow(narrow + j, 0xffff, p);
    }
}

// ds = p (dp - sum of p dp) scale
static void score_gradients(const float *p, const float *dp, int64_t end, float scale, bf16 *ds) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < end; j += LANES)
        total = _mm512_fmadd_ps(_mm512_loadu_ps(p + j), _mm512_loadu_ps(dp + j), total);
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total)), factor = _mm512_set1_ps(scale);
    for (int64_t j = 0; j < end; j += LANES) {
        __m512 each = _mm512_mul_ps(_mm512_loadu_ps(p + j), _mm512_sub_ps(_mm512_loadu_ps(dp + j), mean));
        store_narrow(ds + j, 0xffff, _mm512_mul_ps(each, factor));
    }
}

static void as_pairs(const bf16 *const *rows, int64_t n, const pair **a) {
    for (int64_t i = 0; i < n; i++) a[i] = (const pair *)rows[i];
}

void attention_forward(const Attention *s) {
    int64_t t = s->length, c = s->features, w = s->values, tall = rows_at_once(t), wide = up(t, COLUMNS), head;
    int64_t out = up(w, LANES);
    Scratch scratch = {0};
    pair *keys = take(&scratch, packed_bytes(c, t)), *values = take(&scratch, packed_bytes(t, w));
    float *scores = take(&scratch, sizeof(float) * tall * wide), *sums = take(&scratch, sizeof(float) * tall * out);
    bf16 *p = take(&scratch, sizeof(bf16) * tall * wide);
    const bf16 **rows = take(&scratch, sizeof(bf16 *) * t);
    const pair *a[TALLEST];
    while (!scratch.missing && (head = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->heads) {
        pack_columns(s->k + head * t * c, c, c, t, keys);
        rows_from(s->v + head * t * w, w, t, rows), pack_rows(rows, t, w, values);
        for (int64_t query = head * s->shared; query < (head + 1) * s->shared; query++)
            for (int64_t start = 0; start < t; start += tall) {
                int64_t count = least(tall, t - start), end = start + count;
                rows_from(s->q + (query * t + start) * c, c, count, rows), as_pairs(rows, count, a);
                multiply(a, 1, count, keys, c, c, end, scores, wide, 0);
                for (int64_t i = 0; i < count; i++)
                    softmax_row(scores + i * wide, start + i + 1, up(end, LANES), s->scale, p + i * wide);
                rows_from(p, wide, count, rows), as_pairs(rows, count, a);
                multiply(a, 1, count, values, end, t, w, sums, out, 0);
                for (int64_t i = 0; i < count; i++)
                    narrow_row(sums + i * out, w, s->out + (query * t + start + i) * w);
            }
    }
    if (let_go(&scratch)) s->next[1] = 1;
}

void attention_backward(const Attention *s) {
    int64_t t = s->length, c = s->features, w = s->values, tall = rows_at_once(t), wide = up(t, COLUMNS), head;
    int64_t deep = up(c, LANES), out = up(w, LANES);
    Scratch scratch = {0};
    pair *keys = take(&scratch, packed_bytes(c, t)), *key_rows = take(&scratch, packed_bytes(t, c));
    pair *values = take(&scratch, packed_bytes(w, t)), *packed = take(&scratch, packed_bytes(tall, t));
    pair *queries = take(&scratch, packed_bytes(tall, c)), *grads = take(&scratch, packed_bytes(tall, w));
    float *scores = take(&scratch, sizeof(float) * tall * wide), *dp = take(&scratch, sizeof(float) * tall * wide);
    float *sum_k = take(&scratch, sizeof(float) * t * deep), *sum_v = take(&scratch, sizeof(float) * t * out);
    float *sums = take(&scratch, sizeof(float) * tall * deep);
    bf16 *p = take(&scratch, sizeof(bf16) * tall * wide), *ds = take(&scratch, sizeof(bf16) * tall * wide);
    const bf16 **rows = take(&scratch, sizeof(bf16 *) * t);
    const pair **a = take(&scratch, sizeof(pair *) * most(t, TALLEST));
    while (!scratch.missing && (head = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->heads) {
        pack_columns(s->k + head * t * c, c, c, t, keys);
        rows_from(s->k + head * t * c, c, t, rows), pack_rows(rows, t, c, key_rows);
        pack_columns(s->v + head * t * w, w, w, t, values);
        memset(sum_k, 0, sizeof(float) * t * deep), memset(sum_v, 0, sizeof(float) * t * out);
        for (int64_t query = head * s->shared; query < (head + 1) * s->shared; query++)
            for (int64_t start = 0; start < t; start += tall) {
                int64_t count = least(tall, t - start), end = start + count;
                rows_from(s->q + (query * t + start) * c, c, count, rows), as_pairs(rows, count, a);
                pack_rows(rows, count, c, queries);
                multiply(a, 1, count, keys, c, c, end, scores, wide, 0);
                rows_from(s->grad_out + (query * t + start) * w, w, count, rows), as_pairs(rows, count, a);
                pack_rows(rows, count, w, grads);
                multiply(a, 1, count, values, w, w, end, dp, wide, 0);
                for (int64_t i = 0; i < count; i++) {
                    softmax_row(scores + i * wide, start + i + 1, up(end, LANES), s->scale, p + i * wide);
                    score_gradients(scores + i * wide, dp + i * wide, up(end, LANES), s->scale, ds + i * wide);
                }
                rows_from(ds, wide, count, rows), as_pairs(rows, count, a);
                multiply(a, 1, count, key_rows, end, t, c, sums, deep, 0);
                for (int64_t i = 0; i < count; i++)
                    narrow_row(sums + i * deep, c, s->grad_q + (query * t + start + i) * c);

                pack_rows(rows, count, end, packed), columns_from(packed, count, end, a);
                multiply(a, COLUMNS, end, queries, count, count, c, sum_k, deep, 1);
                rows_from(p, wide, count, rows), pack_rows(rows, count, end, packed);
                multiply(a, COLUMNS, end, grads, count, count, w, sum_v, out, 1);
            }
        for (int64_t i = 0; i < t; i++) narrow_row(sum_k + i * deep, c, s->grad_k + (head * t + i) * c);
        for (int64_t i = 0; i < t; i++) narrow_row(sum_v + i * out, w, s->grad_v + (head * t + i) * w);
    }
    if (let_go(&scratch)) s->next[1] = 1;
}
