// Rows in chunks that are packed and then taken up by a weight's gradient, both by tasks that cores take from a common
// count. A chunk comes before the sums of the one before it, so that what a task waits for was begun long ago; two are
// alive. A sum goes from chunk to chunk in their order, whoever takes its tasks: as many cores as there may be, the same
// bits.
#pragma once
#include <sched.h>

#include "products.h"

typedef struct {
    int64_t chunks, packs, sums;  // chunks; tasks of each kind for one
    int64_t *packed, *summed;     // (chunks) each: those that are done
} Chunks;

typedef struct {
    int64_t chunk, place;  // chunk: -1 where there is nothing to do
    int sums;              // of the second kind
} Task;

static inline Chunks chunks_of(int64_t chunks, int64_t packs, int64_t sums, int64_t *done) {
    return (Chunks){chunks, packs, sums, done, done + chunks};
}
static inline int64_t tasks_of(const Chunks *c) { return (c->chunks + 1) * (c->packs + c->sums); }

static inline void await(const int64_t *count, int64_t tasks) {
    while (__atomic_load_n(count, __ATOMIC_ACQUIRE) < tasks) sched_yield();
}
static inline void is_done(int64_t *count) { __atomic_fetch_add(count, 1, __ATOMIC_RELEASE); }

// The task of this number, once what it reads is there and what it writes over was read.
static inline Task task_at(const Chunks *c, int64_t number) {
    int64_t both = c->sums + c->packs, chunk = (number + c->sums) / both, place = (number + c->sums) % both;
    Task task = {chunk, place - c->sums, 0};
    if (place < c->sums) task = (Task){chunk - 2, place, 1};
    if (task.chunk >= c->chunks) task.chunk = -1;
    if (task.chunk < 0) return (Task){-1, 0, 0};
    if (task.sums) await(c->packed + task.chunk, c->packs);
    int64_t before = task.chunk - (task.sums ? 1 : 2);
    if (before >= 0) await(c->summed + before, c->sums);
    return task;
}
static inline void task_is_done(const Chunks *c, Task task) {
    is_done((task.sums ? c->summed : c->packed) + task.chunk);
}

// A block, BLOCK rows at most from `first`, of a weight's gradient: columns of one packed operand (rows, o), k rows of it,
// by another (rows, i), added to what there is from chunks before.
static inline void sum_block(const pair *grad, const pair *x, int64_t k, int64_t first, int64_t outer, int64_t inner,
                             float *grad_weight, int add) {
    int64_t high = least(BLOCK, outer - first), stride = up(inner, LANES);
    const pair *a[BLOCK];
    for (int64_t i = 0, c = first; i < high; i++, c++) a[i] = grad + c / COLUMNS * COLUMNS * pairs_of(k) + c % COLUMNS;
    multiply(a, COLUMNS, high, x, k, k, inner, grad_weight + first * stride, stride, add);
}
