/* Softmax-free attention on a CPU: sums C'v, products Cw and their cotangents, C = exp(-|x - z|^2/2), x = (q - c)s.

The formulas are those of _attend.py, and X' is the transpose of X. Points are taken BLOCK at a time, all of a block
being in the nearer caches. A block of C lies there transposed, a row for each landmark: then every product has vectors
along an axis that is long or even, one routine serves them all, and an odd number of landmarks costs nothing. Sums over
points are of BLOCK terms each, and these are summed in turn.

The unit of work is an element of the batch whose part of C is small ("whole"), which is kept from the sums to the
product, M and the corrections being applied in between; or CHUNK points of an element, whose partial sums the caller
adds. Neither depends on the number of threads, and so neither do the results. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 128
#define CHUNK 1024
/* Multiplications that are worth another thread: some microseconds of one. */
#define GRAIN (1 << 19)
/* Of exponents: what is below is taken for 0, as processors are slow with products below the smallest normal number. */
#define LOWEST -69.8f
/* Squared norms from which on a difference of two may be no number. */
#define FAR 1e30f

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
/* To a multiple of the widest vectors there are. */
#define PADDED(n) (((n) + 15) / 16 * 16)
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define MOST(a, b) ((a) > (b) ? (a) : (b))
#define TAKE(size) (room += PADDED(size), room - PADDED(size))

/* Of chunks: C' times what is summed; Cw; v_bar, q_bar and H'x. Of whole elements: C'v, w and Cw; C'g, sigma_bar and
   those cotangents. */
enum { SUMS, PRODUCT, COTANGENTS, FORWARD, BACKWARD };

/* Rows of an array (batch, heads, n, width) in memory: each is contiguous; strides are in numbers, which are float, or
   bfloat16 if half. */
struct rows {
    void *at;
    int64_t of_batch, of_head, of_row, half;
};

/* What is summed is v or g. Arrays that are not rows are packed, with the elements of both batch axes on one: c
   (elements, d), z = (landmarks - c)s (elements, m, d), M, transposed or not, and P (elements, m, m), which are read of
   whole elements alone, w and sigma_bar (elements, m, e), sums (elements, chunks, m, e), H'x (elements, chunks, m, d). */
struct task {
    int64_t heads, elements, n, m, d, e, transposed_core, corrections;
    struct rows q, summed, v, g, out, q_bar, v_bar;
    const float *centre, *z, *core, *system;
    float *w, *sigma_bar, *sums, *from_q;
    float scale;
};

/* Some rows of an element. */
struct place {
    long batch, head, element, row, count;
};

/* Rows of floats, padded with zeros. */
struct block {
    const float *at;
    long stride;
};

static void *row_of(const struct rows *x, struct place p)
{
    const long at = p.batch * x->of_batch + p.head * x->of_head + p.row * x->of_row;
    return (char *)x->at + at * (x->half ? 2 : 4);
}

static struct place place_of(const struct task *t, long element, long row, long last)
{
    return (struct place){element / t->heads, element % t->heads, element, row, MOST(0, LEAST(BLOCK, last - row))};
}

static void fetch_rows(const struct rows *x, struct place p, long width)
{
    const long bytes = width * (x->half ? 2 : 4);
    for (long i = 0; i < p.count; i++, p.row++)
        for (long k = 0; k < bytes; k += 64) __builtin_prefetch((char *)row_of(x, p) + k, 0, 2);
}

/* Ask memory for a part of the rows that come next: all at once would wait for it. */
static void fetch(const struct task *t, int what, struct place next, long part, long parts)
{
    const long start = next.count * part / parts;
    next.count = next.count * (part + 1) / parts - start;
    next.row += start;
    fetch_rows(&t->q, next, t->d);
    if (what == SUMS) fetch_rows(&t->summed, next, t->e);
    if (what == COTANGENTS) fetch_rows(&t->v, next, t->e), fetch_rows(&t->g, next, t->e);
}

static inline float from_bfloat16(uint16_t x)
{
    const uint32_t y = (uint32_t)x << 16;
    float f;
    memcpy(&f, &y, 4);
    return f;
}

/* To the nearest, ties to even; what is no number stays so. */
static inline uint16_t to_bfloat16(float f)
{
    uint32_t y;
    memcpy(&y, &f, 4);
    return (y & 0x7fffffff) > 0x7f800000 ? y >> 16 | 0x40 : (y + 0x7fff + (y >> 16 & 1)) >> 16;
}

static int is_whole(int what) { return what == FORWARD || what == BACKWARD; }

/* How many numbers one thread needs to work: all that NAME(work) and NAME(pass) take. */
static size_t room_of(const struct task *t, int what)
{
    const size_t m = t->m, D = PADDED(t->d), E = PADDED(t->e), W = MOST(D, E);
    const size_t blocks = is_whole(what) ? (t->n + BLOCK - 1) / BLOCK : 1;
    return BLOCK * (2 * D + 4 * E + W + m * (1 + blocks)) + m * (D + 3 * E + 2 * W) + PADDED(m);
}

#if defined(__x86_64__)
#define LANES 16
#define TALL 12
#define NAME(x) x##_16
#if defined(__clang__)
#define TARGET __attribute__((target("avx512f"), min_vector_width(512)))
#else
#define TARGET __attribute__((target("avx512f")))
#endif
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#include "_native_lanes.h"

#define LANES 8
#define TALL 4
#define NAME(x) x##_8
#define TARGET __attribute__((target("avx2,fma")))
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#include "_native_lanes.h"
#endif

#define LANES 4
#define TALL 4
#define NAME(x) x##_4
#define TARGET
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 4, 1, 5)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 2, 6, 3, 7)
#include "_native_lanes.h"

/* The width of the widest vectors that this processor has, of those above. */
int lowrank_lanes(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) return 16;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

int lowrank_chunk(void) { return CHUNK; }

struct team {
    const struct task *task;
    void (*work)(const struct task *, int what, long item, float *room);
    long items, next;
    int what;
};

static void member(void *arg)
{
    struct team *team = arg;
    float *room = malloc(sizeof(float) * room_of(team->task, team->what));
    if (!room) return;
    for (long i; (i = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->items;)
        team->work(team->task, team->what, i, room);
    free(room);
}

/* What is asked for, with vectors of so many lanes, on this thread or on a team of at most so many, one for each GRAIN
   of multiplications, which parallel (GOMP_parallel of GNU's OpenMP) brings together. Not 0 if no thread found memory. */
int lowrank_attend(const struct task *task, int what, int lanes, long threads,
                   void (*parallel)(void (*)(void *), void *, unsigned, unsigned))
{
    struct team team = {task, work_4, 0, 0, what};
    team.items = task->elements * (is_whole(what) ? 1 : (task->n + CHUNK - 1) / CHUNK);
#if defined(__x86_64__)
    if (lanes == 16) team.work = work_16;
    if (lanes == 8) team.work = work_8;
#else
    (void)lanes;
#endif
    const long grains = task->elements * task->n * task->m * (task->d + task->e) / GRAIN + 1;
    threads = LEAST(threads, LEAST(team.items, grains));
    if (threads > 1)
        parallel(member, &team, threads, 0);
    else
        member(&team);
    return team.next < team.items;
}
