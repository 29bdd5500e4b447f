// Cross-entropy of the output head on a CPU, fused with its products; logits stay in FP32 and in the cache of a core.
//
//     logits = x · W^T     lse = log sum exp logits     G = exp(logits - lse) · (1 + 2 z lse) - [target], in BF16
//     grad x = G · W       grad W = G^T · x
//
// Once the weight is packed, a block of rows goes from logits to its grad x and leaves G packed; a chunk of them is then
// taken up by grad W (chunks.h).
#include <math.h>

#include "activation.h"
#include "chunks.h"

typedef struct {
    int64_t rows, inner, outer;            // t, d, v
    int64_t block, chunk, blocks, chunks;  // rows of a block, even, and of a chunk; blocks of a chunk; chunks
    int64_t *next, *done;                  // task; (1 + 2 chunks): how many are done
    const bf16 *x;                         // (t, d)
    const float *weight;                   // (v, d)
    const int64_t *target;                 // (t), negative where there is none
    pair *columns;                         // the weight packed for logits
    double *sums;                          // (chunks, blocks, 2): objective and loss of a block
    double z;
    // With gradients alone, else null:
    pair *entries;             // the weight packed for grad x
    pair *grad, *packed_x;     // G and x of two chunks
    float *grad_x, *grad_weight;  // (t, d), (v, d), a row padded to a register's multiple
} Head;

static pair *grad_of(const Head *h, int64_t chunk) {
    return h->grad + chunk % 2 * packed_bytes(h->chunk, h->outer) / sizeof(pair);
}
static pair *x_of(const Head *h, int64_t chunk) {
    return h->packed_x + chunk % 2 * packed_bytes(h->chunk, h->inner) / sizeof(pair);
}

// Of COLUMNS entries, which are columns of the product with x and rows of that with G.
static void pack_entries(const Head *h, int64_t first, bf16 *narrow) {
    int64_t d = h->inner, some = least(COLUMNS, h->outer - first);
    const bf16 *at[COLUMNS];
    narrow_row(h->weight + first * d, some * d, narrow);
    pack_columns(narrow, d, d, some, h->columns + first * pairs_of(d));
    if (h->entries == NULL) return;
    rows_from(narrow, d, some, at);
    pack_part(at, some, h->outer, d, h->entries + first / 2 * COLUMNS);
}

// From a row of logits, which has room for whole panels: their exponentials in its place; the sum, and the greatest.
static float exponentials(float *row, int64_t n, float *greatest) {
    __m512 top[COLUMNS / LANES], sum = _mm512_setzero_ps();
    for (int i = 0; i < COLUMNS / LANES; i++) top[i] = _mm512_set1_ps(-INFINITY);
    for (int64_t j = n; j < up(n, COLUMNS); j++) row[j] = -INFINITY;  // whose exponential is 0
    for (int64_t j = 0; j < n; j += COLUMNS)
        for (int i = 0; i < COLUMNS / LANES; i++) top[i] = _mm512_max_ps(top[i], _mm512_load_ps(row + j + i * LANES));
    for (int i = 1; i < COLUMNS / LANES; i++) top[0] = _mm512_max_ps(top[0], top[i]);
    *greatest = _mm512_reduce_max_ps(top[0]);
    __m512 shift = _mm512_set1_ps(*greatest);
    for (int64_t j = 0; j < n; j += LANES) {
        __m512 power = exponential(_mm512_sub_ps(_mm512_load_ps(row + j), shift));
        _mm512_store_ps(row + j, power);
        sum = _mm512_add_ps(sum, power);
    }
    return _mm512_reduce_add_ps(sum);
}

// Two rows of G, from exponentials to BF16: in the rows' own place, and packed.
static void two_rows(float *row[2], const float scale[2], int64_t n, pair *packed, int64_t panel) {
    __m512 by[2] = {_mm512_set1_ps(scale[0]), _mm512_set1_ps(scale[1])};
    for (int64_t j = 0; j < n; j += LANES) {
        __m256i narrow[2];
        for (int i = 0; i < 2; i++) {
            narrow[i] = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(row[i] + j), by[i]));
            _mm256_store_si256((__m256i *)((bf16 *)row[i] + j), narrow[i]);
        }
        _mm512_store_si512(packed + j / COLUMNS * panel + j % COLUMNS,
                           _mm512_or_si512(_mm512_cvtepu16_epi32(narrow[0]),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow[1]), 16)));
    }
}

// From one or two rows of logits to their losses, and to their G.
static void two_losses(const Head *h, int64_t first, int64_t count, float *logits, int64_t wide, pair *packed,
                       int64_t panel, double sums[2]) {
    float *row[2] = {logits, logits + wide}, scale[2] = {0, 0}, hit[2] = {0, 0};
    for (int64_t i = 0; i < count; i++) {
        int64_t target = h->target[first + i];
        float own = row[i][most(target, 0)], greatest, sum = exponentials(row[i], h->outer, &greatest);
        double lse = greatest + log(sum), counted = target >= 0;
        sums[0] += (lse - own + h->z * lse * lse) * counted, sums[1] += (lse - own) * counted;
        scale[i] = (1 + 2 * h->z * lse) / sum * counted;
        hit[i] = row[i][most(target, 0)] * scale[i] - counted;
    }
    if (packed == NULL) return;
    if (count < 2) memset(row[1], 0, sizeof(float) * wide);
    two_rows(row, scale, h->outer, packed, panel);
    for (int64_t i = 0; i < count; i++) {
        int64_t target = most(h->target[first + i], 0);
        bf16 *as_row = (bf16 *)row[i] + target;
        store_narrow(as_row, 1, _mm512_set1_ps(hit[i]));
        ((bf16 *)(packed + target / COLUMNS * panel + target % COLUMNS))[i] = *as_row;
    }
}

// A block of rows: their losses, G and gradient.
static void rows_of(const Head *h, int64_t chunk, int64_t block, float *logits) {
    int64_t d = h->inner, wide = up(h->outer, COLUMNS), out = up(d, LANES), start = chunk * h->chunk;
    int64_t held = least(h->chunk, h->rows - start), place = block * h->block, count = least(h->block, held - place);
    if (count <= 0) return;
    double *sums = h->sums + 2 * (chunk * h->blocks + block);
    const bf16 *x = h->x + (start + place) * d, *at[BLOCK];
    const pair *a[BLOCK];
    rows_from(x, d, count, at);
    for (int64_t i = 0; i < count; i++) a[i] = (const pair *)at[i];
    multiply(a, 1, count, h->columns, d, d, h->outer, logits, wide, 0);
    pair *grad = h->grad ? grad_of(h, chunk) + place / 2 * COLUMNS : NULL;
    for (int64_t i = 0; i < count; i += 2)
        two_losses(h, start + place + i, least(2, count - i), logits + i * wide, wide, grad ? grad + i / 2 * COLUMNS : NULL,
                   pairs_of(held) * COLUMNS, sums);
    if (grad == NULL) return;
    pack_part(at, count, held, d, x_of(h, chunk) + place / 2 * COLUMNS);
    for (int64_t i = 0; i < count; i++) a[i] = (const pair *)(logits + i * wide);
    multiply(a, 1, count, h->entries, h->outer, h->outer, d, h->grad_x + (start + place) * out, out, 0);
}

void head_loss(const Head *h) {
    int64_t packs = (h->outer + COLUMNS - 1) / COLUMNS, across = h->grad ? (h->outer + BLOCK - 1) / BLOCK : 0, number;
    Chunks chunks = chunks_of(h->chunks, h->blocks, across, h->done + 1);
    Scratch scratch = {0};
    float *logits = take(&scratch, sizeof(float) * h->block * up(h->outer, COLUMNS));
    bf16 *narrow = take(&scratch, sizeof(bf16) * COLUMNS * h->inner);
    while (!scratch.missing && (number = __atomic_fetch_add(h->next, 1, __ATOMIC_RELAXED)) < packs + tasks_of(&chunks)) {
        if (number < packs) {
            pack_entries(h, number * COLUMNS, narrow), is_done(h->done);
            continue;
        }
        await(h->done, packs);
        Task task = task_at(&chunks, number - packs);
        if (task.chunk < 0) continue;
        if (task.sums)
            sum_block(grad_of(h, task.chunk), x_of(h, task.chunk), least(h->chunk, h->rows - task.chunk * h->chunk),
                      task.place * BLOCK, h->outer, h->inner, h->grad_weight, task.chunk > 0);
        else
            rows_of(h, task.chunk, task.place, logits);
        task_is_done(&chunks, task);
    }
    if (let_go(&scratch)) h->next[1] = 1;
}
