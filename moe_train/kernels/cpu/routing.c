// The experts of each token, and the tokens of each expert, in one visit each. Nothing here is worth a second core.
#include "products.h"

// expert (t, k): the k largest of each row of scores (t, e), largest first, the lower expert first of equal ones. NaN is
// larger than any number, as for torch. Returns 1 where memory was missing.
int top_experts(int64_t tokens, int64_t experts, int64_t k, const float *scores, int64_t *expert) {
    const __m512 largest = _mm512_set1_ps(__builtin_inff()), taken = _mm512_set1_ps(__builtin_nanf(""));
    int64_t width = up(experts, LANES);
    Scratch scratch = {0};
    float *row = take(&scratch, sizeof(float) * width);
    for (int64_t t = 0; !scratch.missing && t < tokens; t++) {
        for (int64_t i = 0; i < width; i += LANES) {
            __m512 x = _mm512_maskz_loadu_ps(first_lanes(experts - i), scores + t * experts + i);
            x = _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), largest);
            _mm512_store_ps(row + i, _mm512_mask_mov_ps(taken, first_lanes(experts - i), x));
        }
        for (int64_t j = 0; j < k; j++) {
            __m512 top = _mm512_sub_ps(_mm512_setzero_ps(), largest);
            for (int64_t i = 0; i < width; i += LANES)
                top = _mm512_max_ps(_mm512_load_ps(row + i), top);  // the second where one is NaN, which is taken
            top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
            int64_t found = 0;
            for (; found < width; found += LANES) {
                __mmask16 equal = _mm512_cmp_ps_mask(_mm512_load_ps(row + found), top, _CMP_EQ_OQ);
                if (equal) {
                    found += __builtin_ctz(equal);
                    break;
                }
            }
            expert[t * k + j] = found;
            row[found] = __builtin_nanf("");
        }
    }
    return let_go(&scratch);
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
