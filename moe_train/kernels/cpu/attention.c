// Causal attention on a CPU, from projections' outputs as they lie, features that turn by position included.
//
// Some rows of queries at a time: their scores stay in the cache of a core and are computed again backward
// (FlashAttention, arXiv 2205.14135). Scores, softmax and its gradient are FP32; products read BF16. What lies beyond
// the diagonal is left out of products, six rows of a result at a time.
//
// Cores take the next head of keys, with all heads of queries that share it, from a common count. next[1] becomes 1
// where memory was missing.
#include "activation.h"
#include "products.h"

typedef struct {
    int64_t heads, groups, shared, length;  // of keys b · g, g in a sequence, r of queries to each; t
    int64_t plain, turned, values;          // features of a key that stay and that turn (n, m), and of a value (w)
    int64_t apart, own;                     // from a token's rotary keys to the next one's; whether there is one a head
    int64_t *next;                          // head
    const bf16 *q, *kv, *rotary;            // by token: (g · r · (n + m)), (g · (n + w)), (m) or (g · m)
    const float *cos, *sin;                 // (t, m), or none where all has been turned
    bf16 *out;                              // by token: (g · r · w)
    // Backward alone:
    const bf16 *grad_out;
    bf16 *grad_q, *grad_kv, *grad_rotary;  // the last by token without gaps
    float *parts;                          // of a rotary key's gradient, where it serves all heads: (b · g, t, m)
    int64_t *done;                         // heads of each sequence
    float scale;
} Attention;

enum { SCORES = 1 << 16, TALLEST = 66 };  // of some rows: 256 KB; and so many of these at most

static int64_t rows_at_once(int64_t length) {
    return least(length, most(ROWS, least(TALLEST, SCORES / up(length, COLUMNS) / ROWS * ROWS)));
}

// Feature i against feature i + m / 2, from BF16 to BF16.
static void turn(const Attention *s, int64_t position, const bf16 *from, bf16 *to) {
    const int64_t m = s->turned, half = m / 2;
    if (!s->cos) {
        memcpy(to, from, sizeof(bf16) * m);
        return;
    }
    const float *cos = s->cos + position * m, *sin = s->sin + position * m;
    for (int64_t i = 0; i < half; i += LANES) {
        const __mmask16 mask = first_lanes(half - i);
        __m512 first = widened_at(from + i, mask), second = widened_at(from + half + i, mask);
        __m512 along = _mm512_mul_ps(first, _mm512_maskz_loadu_ps(mask, cos + i));
        __m512 across = _mm512_mul_ps(second, _mm512_maskz_loadu_ps(mask, cos + half + i));
        store_narrow(to + i, mask, _mm512_fnmadd_ps(second, _mm512_maskz_loadu_ps(mask, sin + i), along));
        store_narrow(to + half + i, mask, _mm512_fmadd_ps(first, _mm512_maskz_loadu_ps(mask, sin + half + i), across));
    }
}

// The gradient of what was turned, from that of the result in FP32.
static void turn_back(const Attention *s, int64_t position, const float *from, bf16 *to) {
    const int64_t m = s->turned, half = m / 2;
    if (!s->cos) {
        narrow_row(from, m, to);
        return;
    }
    const float *cos = s->cos + position * m, *sin = s->sin + position * m;
    for (int64_t i = 0; i < half; i += LANES) {
        const __mmask16 mask = first_lanes(half - i);
        __m512 first = _mm512_maskz_loadu_ps(mask, from + i), second = _mm512_maskz_loadu_ps(mask, from + half + i);
        __m512 along = _mm512_mul_ps(first, _mm512_maskz_loadu_ps(mask, cos + i));
        __m512 across = _mm512_mul_ps(second, _mm512_maskz_loadu_ps(mask, cos + half + i));
        store_narrow(to + i, mask, _mm512_fmadd_ps(second, _mm512_maskz_loadu_ps(mask, sin + half + i), along));
        store_narrow(to + half + i, mask, _mm512_fnmadd_ps(first, _mm512_maskz_loadu_ps(mask, sin + i), across));
    }
}

// One head's keys (t, c), turned; the values of token i are at values + i · (all heads' keys and values of a token).
static const bf16 *keys_of(const Attention *s, int64_t head, bf16 *keys) {
    const int64_t c = s->plain + s->turned, t = s->length, each = s->plain + s->values;
    const int64_t group = head % s->groups, token = head / s->groups * t;
    const bf16 *kv = s->kv + (token * s->groups + group) * each;
    const bf16 *rotary = s->rotary + token * s->apart + (s->own ? group * s->turned : 0);
    for (int64_t i = 0; i < t; i++) {
        memcpy(keys + i * c, kv + i * s->groups * each, sizeof(bf16) * s->plain);
        turn(s, i, rotary + i * s->apart, keys + i * c + s->plain);
    }
    return kv + s->plain;
}

// Some rows (count, c) of a head of queries, turned. `first`: the place of (b, i = start, query head) among all.
static void queries_of(const Attention *s, int64_t first, int64_t start, int64_t count, bf16 *to) {
    const int64_t c = s->plain + s->turned, apart = s->groups * s->shared * c;
    for (int64_t i = 0; i < count; i++) {
        const bf16 *from = s->q + first * c + i * apart;
        memcpy(to + i * c, from, sizeof(bf16) * s->plain);
        turn(s, start + i, from + s->plain, to + i * c + s->plain);
    }
}

// Rows of one head are far apart, which processors do not foresee: what comes next is asked for beforehand.
static void fetch(const bf16 *from, int64_t apart, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < n + 31; j += 32)
            _mm_prefetch((const char *)(from + i * apart + least(j, n - 1)), _MM_HINT_T1);
}

static int64_t next_head(const Attention *s) {
    return __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED);
}

// Of keys and values of another head, tokens from `start` on.
static void fetch_keys(const Attention *s, int64_t head, int64_t start, int64_t count) {
    if (head >= s->heads) return;
    const int64_t token = head / s->groups * s->length + start, group = head % s->groups, each = s->plain + s->values;
    fetch(s->kv + (token * s->groups + group) * each, s->groups * each, count, each);
    fetch(s->rotary + token * s->apart + (s->own ? group * s->turned : 0), s->apart, count, s->turned);
}

// Of queries, and of the gradient of their results, the rows that follow `start` of a head and of its `query`th.
static void fetch_queries(const Attention *s, int64_t head, int64_t query, int64_t start, int64_t following,
                          int64_t tall) {
    const int64_t c = s->plain + s->turned, queries = s->groups * s->shared;
    start += tall;
    if (start >= s->length) start = 0, query++;
    if (query == s->shared) query = 0, head = following;
    if (head >= s->heads) return;
    const int64_t count = least(tall, s->length - start);
    const int64_t place = (head / s->groups * s->length + start) * queries + head % s->groups * s->shared + query;
    fetch(s->q + place * c, queries * c, count, c);
    if (s->grad_out) fetch(s->grad_out + place * s->values, queries * s->values, count, s->values);
}

// Products of rows from `start` on with all keys up to their own: (count, k) · (k, end), b packed by keys.
static void scores_of(const pair *const *a, int64_t start, int64_t count, const pair *b, int64_t k, float *c,
                      int64_t stride) {
    for (int64_t column = 0; column < start + count; column += COLUMNS)
        for (int64_t row = most(0, column - start) / ROWS * ROWS; row < count; row += ROWS) {
            const int rows = (int)least(ROWS, count - row);
            const int64_t seen = least(COLUMNS, start + row + rows - column);
            tile_of_any_size(rows, (int)(up(seen, LANES) / LANES), a + row, 1, b + column * pairs_of(k), pairs_of(k),
                             c + row * stride + column, stride, 0);
        }
}

// (count, keys) · (keys, n) for rows from `start` on, whose numbers beyond the diagonal are zeros up to a tile's end.
static void mixed_of(const pair *const *a, int64_t start, int64_t count, const pair *b, int64_t held, int64_t n,
                     float *c, int64_t stride) {
    for (int64_t first = 0; first < pairs_of(start + count); first += DEEP / 2)
        for (int64_t column = 0; column < n; column += COLUMNS) {
            const int vectors = (int)(up(least(COLUMNS, n - column), LANES) / LANES);
            for (int64_t row = 0; row < count; row += ROWS) {
                const pair *at[ROWS];
                const int rows = (int)least(ROWS, count - row);
                const int64_t pairs = least(DEEP / 2, pairs_of(start + row + rows) - first);
                if (pairs <= 0) continue;
                for (int i = 0; i < rows; i++) at[i] = a[row + i] + first;
                tile_of_any_size(rows, vectors, at, 1, b + column * pairs_of(held) + first * COLUMNS, pairs,
                                 c + row * stride + column, stride, first > 0);
            }
        }
}

// Adds (end, count) · (count, n), of which the first is packed by columns in panels of `held` rows; zeros as above.
static void add_to_keys(const pair *a, int64_t held, int64_t start, int64_t count, const pair *b, int64_t n, float *c,
                        int64_t stride) {
    for (int64_t column = 0; column < n; column += COLUMNS) {
        const int vectors = (int)(up(least(COLUMNS, n - column), LANES) / LANES);
        for (int64_t key = 0; key < start + count; key += ROWS) {
            const pair *at[ROWS];
            const int rows = (int)least(ROWS, start + count - key);
            const int64_t first = most(0, key - start) / 2;
            for (int64_t i = 0; i < rows; i++)
                at[i] = a + (key + i) / COLUMNS * COLUMNS * pairs_of(held) + (key + i) % COLUMNS + first * COLUMNS;
            tile_of_any_size(rows, vectors, at, COLUMNS, b + column * pairs_of(count) + first * COLUMNS,
                             pairs_of(count) - first, c + key * stride + column, stride, 1);
        }
    }
}

// The largest of a row's first `seen` scores, times `factor`, which is positive.
static inline __m512 top_of(const float *row, int64_t seen, float factor) {
    const __m512 lowest = _mm512_set1_ps(-3.4e38f);
    __m512 top = lowest;
    int64_t j = 0;
    for (; j + LANES <= seen; j += LANES) top = _mm512_max_ps(top, _mm512_loadu_ps(row + j));
    top = _mm512_max_ps(top, _mm512_mask_loadu_ps(lowest, first_lanes(seen - j), row + j));
    return _mm512_set1_ps(_mm512_reduce_max_ps(top) * factor);
}

// A row of scores becomes probabilities as multiples of the largest, `seen` of them and zeros up to `end`. Returns what
// makes their sum one.
static float softmax_row(const float *row, int64_t seen, int64_t end, float factor, bf16 *narrow) {
    const __m512 top = top_of(row, seen, factor), by = _mm512_set1_ps(factor);
    __m512 total = _mm512_setzero_ps();
    for (int64_t j = 0; j < up(end, LANES); j += LANES) {
        const __mmask16 mask = first_lanes(seen - j);
        __m512 e = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), by, top));
        e = _mm512_maskz_mov_ps(mask, e);
        total = _mm512_add_ps(total, e);
        store_narrow(narrow + j, 0xffff, e);
    }
    return 1.0f / _mm512_reduce_add_ps(total);
}

// Of one row, whose multiples stand in place of its scores: what makes their sum one, and the mean of dp.
typedef struct {
    __m512 share, mean;
} Row;

static inline Row weigh(float *row, const float *dp, int64_t seen, float factor) {
    const __m512 top = top_of(row, seen, factor), by = _mm512_set1_ps(factor);
    __m512 total = _mm512_setzero_ps(), weighted = total;
    for (int64_t j = 0; j < seen; j += LANES) {
        const __mmask16 mask = first_lanes(seen - j);
        __m512 e = _mm512_maskz_mov_ps(mask, power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), by, top)));
        total = _mm512_add_ps(total, e);
        weighted = _mm512_fmadd_ps(e, _mm512_maskz_loadu_ps(mask, dp + j), weighted);
        _mm512_storeu_ps(row + j, e);
    }
    const float share = 1.0f / _mm512_reduce_add_ps(total);
    return (Row){_mm512_set1_ps(share), _mm512_set1_ps(share * _mm512_reduce_add_ps(weighted))};
}

// Two rows of scores and dp, or one, become p and ds = p (dp - mean) scale: in pairs of rows, ds as rows too.
static void gradients_of_two(const Attention *s, float *row, const float *dp, int64_t stride, int rows, int64_t seen,
                             int64_t end, float factor, bf16 *ds, pair *packed_p, pair *packed_ds, int64_t panel) {
    const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 scale = _mm512_set1_ps(s->scale);
    Row each[2] = {weigh(row, dp, seen, factor), {_mm512_setzero_ps(), _mm512_setzero_ps()}};
    if (rows == 2) each[1] = weigh(row + stride, dp + stride, seen + 1, factor);
    for (int64_t j = 0; j < up(end, LANES); j += LANES) {
        __m512 p[2], d[2];
        for (int i = 0; i < 2; i++) {
            const __mmask16 mask = i < rows ? first_lanes(seen + i - j) : 0;
            p[i] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + i * stride + j), each[i].share);
            d[i] = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, dp + i * stride + j), each[i].mean);
            d[i] = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(p[i], d[i]), scale);
            p[i] = _mm512_maskz_mov_ps(mask, p[i]);
        }
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(d[1], d[0]);
        _mm256_storeu_si256((__m256i *)(ds + j), _mm512_castsi512_si256(both));
        if (rows == 2) _mm256_storeu_si256((__m256i *)(ds + stride + j), _mm512_extracti64x4_epi64(both, 1));
        const int64_t to = j / COLUMNS * panel + j % COLUMNS;
        _mm512_store_si512(packed_ds + to, _mm512_permutexvar_epi16(zip, both));
        _mm512_store_si512(packed_p + to, _mm512_permutexvar_epi16(zip, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0])));
    }
}

static void as_pairs(const bf16 *from, int64_t stride, int64_t n, const pair **a) {
    for (int64_t i = 0; i < n; i++) a[i] = (const pair *)(from + i * stride);
}

static const float LOG2_E = 1.44269504f;

void attention_forward(const Attention *s) {
    int64_t t = s->length, c = s->plain + s->turned, w = s->values, tall = rows_at_once(t), wide = up(t, COLUMNS);
    int64_t out = up(w, LANES), each = s->plain + w, queries = s->groups * s->shared;
    Scratch scratch = {0};
    pair *keys = take(&scratch, packed_bytes(c, t)), *values = take(&scratch, packed_bytes(t, w));
    float *scores = take(&scratch, sizeof(float) * tall * wide), *sums = take(&scratch, sizeof(float) * tall * out);
    bf16 *p = take(&scratch, sizeof(bf16) * tall * wide), *k = take(&scratch, sizeof(bf16) * t * c);
    bf16 *q = take(&scratch, sizeof(bf16) * tall * c);
    const bf16 **rows = take(&scratch, sizeof(bf16 *) * t);
    const pair *a[TALLEST];
    for (int64_t head = next_head(s), following; !scratch.missing && head < s->heads; head = following) {
        following = next_head(s);
        rows_from(keys_of(s, head, k), s->groups * each, t, rows), pack_rows(rows, t, w, values);
        pack_columns(k, c, c, t, keys);
        for (int64_t query = head % s->groups * s->shared; query < (head % s->groups + 1) * s->shared; query++)
            for (int64_t start = 0; start < t; start += tall) {
                const int64_t count = least(tall, t - start);
                const int64_t place = (head / s->groups * t + start) * queries + query;
                float share[TALLEST];
                fetch_queries(s, head, query - head % s->groups * s->shared, start, following, tall);
                if (query % s->shared == 0) fetch_keys(s, following, start, count);
                queries_of(s, place, start, count, q), as_pairs(q, c, count, a);
                scores_of(a, start, count, keys, c, scores, wide);
                for (int64_t i = 0; i < count; i++)
                    share[i] = softmax_row(scores + i * wide, start + i + 1, start + least(count, up(i + 1, ROWS)),
                                           s->scale * LOG2_E, p + i * wide);
                as_pairs(p, wide, count, a);
                mixed_of(a, start, count, values, t, w, sums, out);
                for (int64_t i = 0; i < count; i++) {
                    for (int64_t j = 0; j < w; j += LANES)
                        store_narrow(s->out + (place + i * queries) * w + j, first_lanes(w - j),
                                     _mm512_mul_ps(_mm512_loadu_ps(sums + i * out + j), _mm512_set1_ps(share[i])));
                }
            }
    }
    if (let_go(&scratch)) s->next[1] = 1;
}

// The gradient of rotary keys that serve all heads of a sequence: that of each, in order.
static void sum_of_parts(const Attention *s, int64_t sequence, float *sums) {
    const int64_t t = s->length, m = s->turned, first = sequence * s->groups;
    for (int64_t i = 0; i < t; i++) {
        memcpy(sums, s->parts + (first * t + i) * m, sizeof(float) * m);
        for (int64_t group = 1; group < s->groups; group++)
            for (int64_t j = 0; j < m; j++) sums[j] += s->parts[((first + group) * t + i) * m + j];
        turn_back(s, i, sums, s->grad_rotary + (sequence * t + i) * m);
    }
}

void attention_backward(const Attention *s) {
    int64_t t = s->length, c = s->plain + s->turned, w = s->values, tall = rows_at_once(t), wide = up(t, COLUMNS);
    int64_t deep = up(c, LANES), out = up(w, LANES), each = s->plain + w, queries = s->groups * s->shared;
    Scratch scratch = {0};
    pair *keys = take(&scratch, packed_bytes(c, t)), *key_rows = take(&scratch, packed_bytes(t, c));
    pair *values = take(&scratch, packed_bytes(w, t));
    pair *packed_p = take(&scratch, packed_bytes(tall, t)), *packed_ds = take(&scratch, packed_bytes(tall, t));
    pair *packed_q = take(&scratch, packed_bytes(tall, c)), *grads = take(&scratch, packed_bytes(tall, w));
    float *scores = take(&scratch, sizeof(float) * tall * wide), *dp = take(&scratch, sizeof(float) * tall * wide);
    float *sum_k = take(&scratch, sizeof(float) * t * deep), *sum_v = take(&scratch, sizeof(float) * t * out);
    float *sums = take(&scratch, sizeof(float) * tall * deep);
    bf16 *k = take(&scratch, sizeof(bf16) * t * c), *q = take(&scratch, sizeof(bf16) * tall * c);
    bf16 *ds = take(&scratch, sizeof(bf16) * tall * wide);
    const bf16 **rows = take(&scratch, sizeof(bf16 *) * t);
    const pair *a[TALLEST];
    for (int64_t head = next_head(s), following; !scratch.missing && head < s->heads; head = following) {
        following = next_head(s);
        const int64_t sequence = head / s->groups, group = head % s->groups;
        pack_columns(keys_of(s, head, k), s->groups * each, w, t, values);
        pack_columns(k, c, c, t, keys);
        rows_from(k, c, t, rows), pack_rows(rows, t, c, key_rows);
        memset(sum_k, 0, sizeof(float) * t * deep), memset(sum_v, 0, sizeof(float) * t * out);
        for (int64_t query = group * s->shared; query < (group + 1) * s->shared; query++)
            for (int64_t start = 0; start < t; start += tall) {
                const int64_t count = least(tall, t - start), place = (sequence * t + start) * queries + query;
                fetch_queries(s, head, query - group * s->shared, start, following, tall);
                if (query % s->shared == 0) fetch_keys(s, following, start, count);
                queries_of(s, place, start, count, q), as_pairs(q, c, count, a);
                rows_from(q, c, count, rows), pack_rows(rows, count, c, packed_q);
                scores_of(a, start, count, keys, c, scores, wide);
                as_pairs(s->grad_out + place * w, queries * w, count, a);
                rows_from(s->grad_out + place * w, queries * w, count, rows), pack_rows(rows, count, w, grads);
                scores_of(a, start, count, values, w, dp, wide);
                for (int64_t i = 0; i < count; i += 2)  // zeros as far as tiles of rows or of keys read
                    gradients_of_two(s, scores + i * wide, dp + i * wide, wide, (int)least(2, count - i), start + i + 1,
                                     start + least(count, i + 2 + ROWS), s->scale * LOG2_E, ds + i * wide,
                                     packed_p + i / 2 * COLUMNS, packed_ds + i / 2 * COLUMNS, COLUMNS * pairs_of(tall));
                as_pairs(ds, wide, count, a);
                mixed_of(a, start, count, key_rows, t, c, sums, deep);
                for (int64_t i = 0; i < count; i++) {
                    bf16 *to = s->grad_q + (place + i * queries) * c;
                    narrow_row(sums + i * deep, s->plain, to);
                    turn_back(s, start + i, sums + i * deep + s->plain, to + s->plain);
                }
                add_to_keys(packed_ds, tall, start, count, packed_q, c, sum_k, deep);
                add_to_keys(packed_p, tall, start, count, grads, w, sum_v, out);
            }
        for (int64_t i = 0; i < t; i++) {
            const float *turned = sum_k + i * deep + s->plain;
            bf16 *to = s->grad_kv + ((sequence * t + i) * s->groups + group) * each;
            narrow_row(sum_k + i * deep, s->plain, to), narrow_row(sum_v + i * out, w, to + s->plain);
            if (s->own) turn_back(s, i, turned, s->grad_rotary + ((sequence * t + i) * s->groups + group) * s->turned);
            else memcpy(s->parts + (head * t + i) * s->turned, turned, sizeof(float) * s->turned);
        }
        if (!s->own && __atomic_add_fetch(s->done + sequence, 1, __ATOMIC_ACQ_REL) == s->groups)
            sum_of_parts(s, sequence, sum_k);
    }
    if (let_go(&scratch)) s->next[1] = 1;
}
