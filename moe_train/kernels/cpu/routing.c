// The experts of each token, with their scores, the gradient of these, and the tokens of each expert: a visit each. Cores
// take parts of the sequences, which do not depend on how many cores there are; sorting is not worth a second core.
#include "activation.h"
#include "products.h"

typedef struct {
    int64_t tokens, experts, k, length, parts;  // t = sequences · length; parts that a sequence is cut in
    int64_t *next;                              // part of all sequences
    const float *scores, *logits;               // (t, e): scores, or logits whose sigmoid they are
    const float *bias;                          // (e): added to choose by, or none
    const uint8_t *real;                        // (t): bool
    int64_t *expert;                            // (t, k): written forward, read backward
    float *chosen;                              // (t, k): the scores of these, or none
    float *share;                               // (sequences, parts, e): sums over real tokens of scores by their sum, or none
    // Backward alone:
    const float *grad_chosen, *grad_share;      // (t, k); (sequences, e), or none
    float *grad_logits;                         // (t, e)
} Choice;

static int next_part(const Choice *c, int64_t *first, int64_t *end, int64_t *part) {
    int64_t sequences = c->tokens / c->length, each;
    if ((*part = __atomic_fetch_add(c->next, 1, __ATOMIC_RELAXED)) >= sequences * c->parts) return 0;
    each = *part % c->parts;
    *first = *part / c->parts * c->length, *end = *first + c->length * (each + 1) / c->parts;
    *first += c->length * each / c->parts;
    return 1;
}

// The k largest of a row, largest first, the lower place first of equal ones; all that are taken become NaN.
static void take_largest(float *row, int64_t width, int64_t k, int64_t *place) {
    const __m512 taken = _mm512_set1_ps(__builtin_nanf(""));
    for (int64_t j = 0; j < k; j++) {
        __m512 top = _mm512_set1_ps(-__builtin_inff());
        for (int64_t i = 0; i < width; i += LANES)
            top = _mm512_max_ps(_mm512_load_ps(row + i), top);  // the second where one is NaN, which is taken
        top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        uint64_t equal = 0;
        int64_t first = 0;
        for (; !equal && first < width; first += 4 * LANES)  // of 64 at a time, which takes no branch for so many experts
            for (int64_t i = 0; i < least(4 * LANES, width - first); i += LANES)
                equal |= (uint64_t)_mm512_cmp_ps_mask(_mm512_load_ps(row + first + i), top, _CMP_EQ_OQ) << i;
        place[j] = first - 4 * LANES + __builtin_ctzll(equal);
        // A whole register is stored, since it is loaded next: a single number would have to reach memory first.
        float *at = row + place[j] / LANES * LANES;
        __mmask16 one = 1u << place[j] % LANES;
        _mm512_store_ps(at, _mm512_mask_mov_ps(_mm512_load_ps(at), one, taken));
    }
}

// The experts of each token. NaN is larger than any number, as for torch.
void choose_experts(const Choice *c) {
    const __m512 largest = _mm512_set1_ps(__builtin_inff()), taken = _mm512_set1_ps(__builtin_nanf(""));
    int64_t e = c->experts, k = c->k, width = up(e, LANES), first, end, part;
    Scratch scratch = {0};
    float *score = take(&scratch, sizeof(float) * width), *row = take(&scratch, sizeof(float) * width);
    while (!scratch.missing && next_part(c, &first, &end, &part)) {
        float *share = c->share ? c->share + part * e : NULL;
        if (share) memset(share, 0, sizeof(float) * e);
        for (int64_t t = first; t < end; t++) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < width; i += LANES) {
                __mmask16 mask = first_lanes(e - i);
                __m512 x = _mm512_maskz_loadu_ps(mask, (c->logits ? c->logits : c->scores) + t * e + i);
                if (c->logits) x = _mm512_maskz_mov_ps(mask, sigmoid(x));
                sum = _mm512_add_ps(sum, x);
                _mm512_store_ps(score + i, x);
                if (c->bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, c->bias + i));
                x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), largest);
                _mm512_store_ps(row + i, _mm512_mask_mov_ps(taken, mask, x));
            }
            take_largest(row, width, k, c->expert + t * k);
            if (c->chosen)
                for (int64_t j = 0; j < k; j++) c->chosen[t * k + j] = score[c->expert[t * k + j]];
            if (share && c->real[t]) {
                __m512 scale = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
                FOR_LANES(i, e, mask, {
                    __m512 before = _mm512_maskz_loadu_ps(mask, share + i);
                    _mm512_mask_storeu_ps(share + i, mask, _mm512_fmadd_ps(_mm512_load_ps(score + i), scale, before));
                });
            }
        }
    }
    if (let_go(&scratch)) c->next[1] = 1;
}

// Of the logits, with s = sigmoid(logit): s (1 - s) times the gradient of s, which is that of the scores chosen and, with
// the sum S of a token's scores and the gradient g of its sequence's shares, g / S - (sum of g s) / S^2.
void chosen_gradient(const Choice *c) {
    const __m512 one = _mm512_set1_ps(1.0f);
    int64_t e = c->experts, k = c->k, width = up(e, LANES), first, end, part;
    Scratch scratch = {0};
    float *score = take(&scratch, sizeof(float) * width), *grad = take(&scratch, sizeof(float) * width);
    while (!scratch.missing && next_part(c, &first, &end, &part)) {
        const float *shares = c->grad_share ? c->grad_share + part / c->parts * e : NULL;
        for (int64_t t = first; t < end; t++) {
            int counts = shares && c->real[t];
            __m512 sum = _mm512_setzero_ps(), along = _mm512_setzero_ps();
            for (int64_t i = 0; i < width; i += LANES) {
                __mmask16 mask = first_lanes(e - i);
                __m512 s = _mm512_maskz_mov_ps(mask, sigmoid(_mm512_maskz_loadu_ps(mask, c->logits + t * e + i)));
                _mm512_store_ps(score + i, s);
                sum = _mm512_add_ps(sum, s);
                if (counts) along = _mm512_fmadd_ps(s, _mm512_maskz_loadu_ps(mask, shares + i), along);
            }
            float scale = 1.0f / _mm512_reduce_add_ps(sum), mean = scale * _mm512_reduce_add_ps(along);
            for (int64_t i = 0; i < width; i += LANES) {
                __m512 g = _mm512_setzero_ps();
                if (counts) g = _mm512_maskz_loadu_ps(first_lanes(e - i), shares + i);
                if (counts) g = _mm512_mul_ps(_mm512_sub_ps(g, _mm512_set1_ps(mean)), _mm512_set1_ps(scale));
                _mm512_store_ps(grad + i, g);
            }
            if (c->grad_chosen)
                for (int64_t j = 0; j < k; j++) grad[c->expert[t * k + j]] += c->grad_chosen[t * k + j];
            FOR_LANES(i, e, mask, {
                __m512 s = _mm512_load_ps(score + i), slope = _mm512_mul_ps(s, _mm512_sub_ps(one, s));
                __m512 all = _mm512_mul_ps(_mm512_load_ps(grad + i), slope);
                _mm512_mask_storeu_ps(c->grad_logits + t * e + i, mask, all);
            });
        }
    }
    if (let_go(&scratch)) c->next[1] = 1;
}

// Pairs p = token · k + choice sorted by their expert, in the order of tokens: the pair and the token at each place, the
// place of each pair, where each expert's places end, and how many of its tokens are real (b: bool, t).
int sort_by_expert(int64_t tokens, int64_t experts, int64_t k, const int64_t *expert, const uint8_t *real, int64_t *pair_at,
                    int64_t *token_at, int64_t *place, int32_t *ends, int64_t *counts) {
    memset(ends, 0, sizeof(int32_t) * experts), memset(counts, 0, sizeof(int64_t) * experts);
    for (int64_t p = 0; p < tokens * k; p++) ends[expert[p]]++, counts[expert[p]] += real[p / k];
    int32_t before = 0;
    for (int64_t e = 0; e < experts; e++) {
        int32_t count = ends[e];
        ends[e] = before, before += count;  // where the next of its pairs goes, and so in the end where they end
    }
    for (int64_t t = 0, p = 0; t < tokens; t++)
        for (int64_t j = 0; j < k; j++, p++) {
            int32_t at = ends[expert[p]]++;
            place[p] = at, pair_at[at] = p, token_at[at] = t;
        }
    return 0;
}
