// Linear layers on a CPU: rows in BF16 by a weight in FP32, which is rounded to BF16 while it is packed, and both gradients;
// and SwiGLU between two of them. Cores take a part of the rows each, or tasks of the weight's gradient as they come (chunks.h).
#include "activation.h"
#include "chunks.h"

enum { WIDE = 256 };  // columns whose part of the weight stays in the second cache
enum { PART = 84, CHUNK = 6 * PART };  // rows of a task, and of a chunk, that are packed for the weight's gradient

typedef struct {
    int64_t rows, inner, outer, parts;  // m, i, o; parts the rows are cut in
    int64_t *next;                      // part, or block
    const bf16 *x;                      // (m, i)
    const float *weight;                // (o, i)
    bf16 *y;                            // (m, o)
    const bf16 *grad_y;                 // (m, o)
    bf16 *grad_x;                       // (m, i)
    float *grad_weight;                 // (o, i), a row padded to a register's multiple; or of each part
    pair *packed;                       // x and grad_y of two chunks
    int64_t *done;                      // (2, chunks): tasks that are
} Linear;

// The product of a part of the rows `from` (m, k) with columns of the packed weight, n in all, a chunk at a time.
static void rows_by(const bf16 *from, int64_t first, int64_t end, int64_t k, const pair *packed, int64_t column,
                    int64_t some, int64_t n, float *sums, bf16 *to) {
    const pair *a[BLOCK];
    for (int64_t row = first; row < end; row += BLOCK) {
        int64_t count = least(BLOCK, end - row);
        for (int64_t i = 0; i < count; i++) a[i] = (const pair *)(from + (row + i) * k);
        multiply(a, 1, count, packed, k, k, some, sums, WIDE, 0);
        for (int64_t i = 0; i < count; i++) narrow_row(sums + i * WIDE, some, to + (row + i) * n + column);
    }
}

void linear_forward(const Linear *l) {
    Scratch scratch = {0};
    pair *packed = take(&scratch, packed_bytes(l->inner, WIDE));
    float *sums = take(&scratch, sizeof(float) * BLOCK * WIDE);
    bf16 *narrow = take(&scratch, sizeof(bf16) * WIDE * l->inner);
    int64_t part;
    while (!scratch.missing && (part = __atomic_fetch_add(l->next, 1, __ATOMIC_RELAXED)) < l->parts) {
        int64_t first = l->rows * part / l->parts, end = l->rows * (part + 1) / l->parts;
        for (int64_t column = 0; column < l->outer; column += WIDE) {
            int64_t some = least(WIDE, l->outer - column);
            narrow_row(l->weight + column * l->inner, some * l->inner, narrow);
            pack_columns(narrow, l->inner, l->inner, some, packed);
            rows_by(l->x, first, end, l->inner, packed, column, some, l->outer, sums, l->y);
        }
    }
    if (let_go(&scratch)) l->next[1] = 1;
}

void linear_input_gradient(const Linear *l) {
    Scratch scratch = {0};
    pair *packed = take(&scratch, packed_bytes(l->outer, WIDE));
    float *sums = take(&scratch, sizeof(float) * BLOCK * WIDE);
    bf16 *narrow = take(&scratch, sizeof(bf16) * WIDE * l->outer);
    const bf16 **at = take(&scratch, sizeof(bf16 *) * l->outer);
    int64_t part;
    while (!scratch.missing && (part = __atomic_fetch_add(l->next, 1, __ATOMIC_RELAXED)) < l->parts) {
        int64_t first = l->rows * part / l->parts, end = l->rows * (part + 1) / l->parts;
        for (int64_t column = 0; column < l->inner; column += WIDE) {
            int64_t some = least(WIDE, l->inner - column);
            for (int64_t o = 0; o < l->outer; o++) narrow_row(l->weight + o * l->inner + column, some, narrow + o * some);
            rows_from(narrow, some, l->outer, at), pack_rows(at, l->outer, some, packed);
            rows_by(l->grad_y, first, end, l->outer, packed, column, some, l->inner, sums, l->grad_x);
        }
    }
    if (let_go(&scratch)) l->next[1] = 1;
}

// Both gradients, of a part of the rows after another, where the weight's stays in the second cache: grad_weight (parts, o, i)
// is to be added up.
void linear_gradients(const Linear *l) {
    int64_t d = l->inner, o = l->outer, out = up(d, LANES), part;
    Scratch scratch = {0};
    pair *packed = take(&scratch, packed_bytes(o, d));
    pair *x = take(&scratch, packed_bytes(DEEP, d)), *grad = take(&scratch, packed_bytes(DEEP, o));
    float *sum_weight = take(&scratch, sizeof(float) * o * out), *sums = take(&scratch, sizeof(float) * BLOCK * out);
    bf16 *narrow = take(&scratch, sizeof(bf16) * o * d);
    const bf16 **at = take(&scratch, sizeof(bf16 *) * most(o, DEEP));
    const pair **a = take(&scratch, sizeof(pair *) * most(o, DEEP));
    if (!scratch.missing) {
        narrow_row(l->weight, o * d, narrow);
        rows_from(narrow, d, o, at), pack_rows(at, o, d, packed);
    }
    while (!scratch.missing && (part = __atomic_fetch_add(l->next, 1, __ATOMIC_RELAXED)) < l->parts) {
        int64_t first = l->rows * part / l->parts, end = l->rows * (part + 1) / l->parts;
        if (first == end) memset(sum_weight, 0, sizeof(float) * o * out);
        for (int64_t row = first; row < end; row += DEEP) {
            int64_t count = least(DEEP, end - row);
            for (int64_t start = 0; start < count; start += BLOCK) {
                int64_t some = least(BLOCK, count - start);
                for (int64_t i = 0; i < some; i++) a[i] = (const pair *)(l->grad_y + (row + start + i) * o);
                multiply(a, 1, some, packed, o, o, d, sums, out, 0);
                for (int64_t i = 0; i < some; i++) narrow_row(sums + i * out, d, l->grad_x + (row + start + i) * d);
            }
            rows_from(l->grad_y + row * o, o, count, at), pack_rows(at, count, o, grad);
            rows_from(l->x + row * d, d, count, at), pack_rows(at, count, d, x);
            columns_from(grad, count, o, a);
            multiply(a, COLUMNS, o, x, count, count, d, sum_weight, out, row > first);
        }
        for (int64_t i = 0; i < o; i++)
            memcpy(l->grad_weight + (part * o + i) * d, sum_weight + i * out, sizeof(float) * d);
    }
    if (let_go(&scratch)) l->next[1] = 1;
}

// Of a chunk of rows, which holds so many, PART from `first`.
static void pack_rows_of(const bf16 *from, int64_t first, int64_t held, int64_t n, pair *to) {
    int64_t count = least(PART, held - first);
    const bf16 *at[PART];
    if (count <= 0) return;
    rows_from(from + first * n, n, count, at);
    pack_part(at, count, held, n, to + first / 2 * COLUMNS);
}

void linear_weight_gradient(const Linear *l) {
    int64_t x_size = packed_bytes(CHUNK, l->inner) / sizeof(pair), grad_size = packed_bytes(CHUNK, l->outer) / sizeof(pair);
    int64_t blocks = (l->outer + BLOCK - 1) / BLOCK, number;
    Chunks chunks = chunks_of((l->rows + CHUNK - 1) / CHUNK, CHUNK / PART, blocks, l->done);
    while ((number = __atomic_fetch_add(l->next, 1, __ATOMIC_RELAXED)) < tasks_of(&chunks)) {
        Task task = task_at(&chunks, number);
        if (task.chunk < 0) continue;
        int64_t start = task.chunk * CHUNK, held = least(CHUNK, l->rows - start);
        pair *x = l->packed + task.chunk % 2 * x_size, *grad = l->packed + 2 * x_size + task.chunk % 2 * grad_size;
        if (task.sums) {
            sum_block(grad, x, held, task.place * BLOCK, l->outer, l->inner, l->grad_weight, start > 0);
        } else {
            pack_rows_of(l->x + start * l->inner, task.place * PART, held, l->inner, x);
            pack_rows_of(l->grad_y + start * l->outer, task.place * PART, held, l->outer, grad);
        }
        task_is_done(&chunks, task);
    }
}

typedef struct {
    int64_t rows, width, parts;  // m, f
    int64_t *next;
    const bf16 *gate_up;  // (m, 2f)
    bf16 *h;              // (m, f): silu(gate) · up
    const bf16 *grad_h;   // backward alone
    bf16 *grad_gate_up;
} SwiGLU;

void swiglu_forward(const SwiGLU *s) {
    int64_t f = s->width, part;
    while ((part = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->parts)
        for (int64_t row = s->rows * part / s->parts; row < s->rows * (part + 1) / s->parts; row++)
            for (int64_t j = 0; j < f; j += LANES) {
                __mmask16 mask = first_lanes(f - j);
                const bf16 *z = s->gate_up + row * 2 * f + j;
                __m512 gate = widened_at(z, mask), active = _mm512_mul_ps(gate, sigmoid(gate));
                store_narrow(s->h + row * f + j, mask, _mm512_mul_ps(active, widened_at(z + f, mask)));
            }
}

void swiglu_backward(const SwiGLU *s) {
    const __m512 one = _mm512_set1_ps(1.0f);
    int64_t f = s->width, part;
    while ((part = __atomic_fetch_add(s->next, 1, __ATOMIC_RELAXED)) < s->parts)
        for (int64_t row = s->rows * part / s->parts; row < s->rows * (part + 1) / s->parts; row++)
            for (int64_t j = 0; j < f; j += LANES) {
                __mmask16 mask = first_lanes(f - j);
                const bf16 *z = s->gate_up + row * 2 * f + j;
                bf16 *grad_z = s->grad_gate_up + row * 2 * f + j;
                __m512 gate = widened_at(z, mask), up_ = widened_at(z + f, mask);
                __m512 grad = widened_at(s->grad_h + row * f + j, mask);
                __m512 share = sigmoid(gate), active = _mm512_mul_ps(gate, share);
                __m512 slope = _mm512_fmadd_ps(active, _mm512_sub_ps(one, share), share);  // of silu
                store_narrow(s->h + row * f + j, mask, _mm512_mul_ps(active, up_));
                store_narrow(grad_z, mask, _mm512_mul_ps(_mm512_mul_ps(grad, up_), slope));
                store_narrow(grad_z + f, mask, _mm512_mul_ps(grad, active));
            }
}
