/* On a CPU and in float: softmax-free attention, its core, Newton's steps, and the MLP that follows in a transformer.

Points or tokens are taken BLOCK at a time, all of a block being in the nearer caches, and sums over them are of BLOCK
terms each, which are summed in turn. What is a unit of work does not depend on the number of threads, and so neither do
the results. What is computed is in the headers, X' being the transpose of X. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#define BLOCK 128
/* Points of an element of attention in a unit of work. */
#define CHUNK 1024
/* Features of the MLP's hidden layer that are taken together, two of the widest vectors. */
#define PANEL 32
/* Numbers whose GELU is a unit of work. */
#define SPAN (1 << 14)
/* Terms of a product that are taken together. */
#define DEEP 192
/* Bytes of a line of the caches, and numbers of an array that is stored past them. */
#define LINE 64
#define STREAMED (1 << 18)
/* Multiplications that are worth another thread: some microseconds of one. */
#define GRAIN (1 << 19)
/* Of exponents: what is below is taken for 0, as processors are slow with products below the smallest normal number. */
#define LOWEST -69.8f
/* Points whose part of a sum is added to it as one: the error of a sum is that of so many terms. */
#define FEW 32
/* Entries of C, of points within a tenth of a lengthscale from a landmark, whose cotangents are formed of differences. */
#define CLOSE 0.995f
/* |z|^2/2 of a landmark in whose row of C'v rounding is twice as much as near the centre. */
#define REACH 8
/* Squared norms from which on a difference of two may be no number. */
#define FAR 1e30f
/* Of cotangents of Newton's steps, 2^-90. */
#define TINY 0x1p-90f
/* D. Hendrycks & K. Gimpel, arXiv 1606.08415, section 2: (1 + tanh(y/2))/2 is s(y). */
#define BETA 1.59576912f /* 2 sqrt(2/pi) */
#define GAMMA 0.044715f

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
/* To a multiple of the widest vectors there are. */
#define PADDED(n) (((n) + 15) / 16 * 16)
/* From one row of a large matrix to the next, so that rows do not compete for the same places in a cache. */
#define APART(n) ((n) + 16)
/* What was stored past the caches is to be seen by other threads. */
#if defined(__x86_64__)
#define FENCE __builtin_ia32_sfence()
#else
#define FENCE __atomic_thread_fence(__ATOMIC_RELEASE)
#endif
#define LEAST(a, b) ((a) < (b) ? (a) : (b))
#define MOST(a, b) ((a) > (b) ? (a) : (b))
#define TAKE(size) (room += PADDED(size), room - PADDED(size))

/* Of chunks: C' times what is summed, and the same in double precision; Cw; v_bar, q_bar and H'x. Of whole elements: C'v,
   w and Cw; C'g, sigma_bar, those cotangents and z_bar. Of elements in chunks: w for sums over all of them. */
enum { SUMS, WIDE_SUMS, PRODUCT, COTANGENTS, FORWARD, BACKWARD, SOLUTION };

/* Rows of an array (batch, heads, n, width) in memory: each is contiguous; strides are in numbers, which are float, or
   bfloat16 if half. */
struct rows {
    void *at;
    int64_t of_batch, of_head, of_row, half;
};

/* What is summed is v or g. Arrays that are not rows are packed, with the elements of both batch axes on one: c
   (elements, d), z, the landmarks as they are (elements, m, d), M, transposed or not, and P (elements, m, m), which
   w is solved for with, w and sigma_bar (elements, m, e), sums (elements, chunks, m, e), wide_sums likewise, H'x and
   H'1 (elements, chunks, m, d + 1) and z_bar (elements, m, d). Where rounding of C'v would count in w for more than most of
   its eps, if that is not 0, C'v is summed in double precision; amplified (elements) tells of elements in chunks for
   which that is so, and wide_sums are of these alone. */
struct attention {
    int64_t heads, elements, n, m, d, e, transposed_core, corrections, of_gram, most;
    struct rows q, summed, v, g, out, q_bar, v_bar;
    const float *centre, *z, *core;
    const double *system;
    float *w, *sigma_bar, *sums, *z_bar;
    double *from_q, *wide_sums;
    char *amplified;
    double scale;
};

/* Means of segments of points (batch, heads, n, d), of which the first n mod m have a point more than the others: z
   (elements, m, d), and the mean of these, centre (elements, d). */
enum { MEANS, CENTRES };

struct segments {
    int64_t heads, elements, n, m, d;
    struct rows points;
    float *z, *centre;
};

/* The landmarks as they are (elements, m, d), c (elements, d), and s, with z = (landmark - c)s; A, P and M, the inverse
   (elements, m, m); the steps (count, 3) and the scale of P that they are for; what M is tried with, probes (probed, m),
   what they may be off in all, and whether they are, valid (elements). */
enum { GRAM, INVERT };

struct core {
    int64_t elements, m, d, count, probed;
    const float *z, *centre, *steps, *probes;
    float *a;
    double *system;
    float *inverse;
    char *valid;
    double s, ridge;
    float scale, most;
};

/* x, a and g, out, and their cotangents (elements, m, m); count steps. */
enum { STEPS, STEPS_BACK };

struct newton {
    int64_t elements, m, count;
    const float *x, *a, *g;
    float *out, *x_bar, *a_bar;
};

/* Weights are packed in panels of PANEL of their columns, or rows, to be read in the order in which they lie in memory:
   where they are they would be a page apart. */
enum { MLP_PACK, MLP_PACK_BACK, MLP_FORWARD, MLP_ROWS, MLP_WEIGHTS };

/* GELU(x A' + a) B' + b, + x if residual: x, g, out and x_bar (rows, width), w1 = A and its cotangent (hidden, width),
   b1 = a (hidden), w2 = B (width, hidden), b2 = b (width), the widths being multiples of PANEL; their panels; and, on the
   way back, of each of the blocks in a chunk, first to last of the rows, the hidden layer and its cotangent before the
   activation (blocks, hidden / PANEL, BLOCK, PANEL) and the sums of this over the block (blocks, hidden). */
struct mlp {
    int64_t rows, width, hidden, residual, blocks, first, last;
    const float *x, *g, *w1, *b1, *w2, *b2;
    float *out, *x_bar, *w1_bar, *b1_bar, *w2_bar, *w1_rows, *w1_columns, *w2_rows, *w2_columns, *h, *u_bar, *sums;
};

/* GELU(u), or its cotangent for one, g, of count numbers in a row, which are float, or bfloat16 if half. */
enum { GELU, GELU_BACK };

struct gelu {
    int64_t count, half;
    const void *u, *g;
    void *out;
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

static struct place place_of(const struct attention *t, long element, long row, long last)
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
static void fetch(const struct attention *t, int what, struct place next, long part, long parts)
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

/* What becomes of a product: it is stored, or added to what is there, or stored past the caches. */
enum { SETS, ADDS, STREAMS };

/* How a cotangent of attention is stored: a large one past the caches, which are for what is read twice, if its rows are
   whole lines of them. The output is not: what comes next reads it. */
static int way_of(const struct rows *x, const struct attention *t, long width)
{
    const size_t all = (size_t)x->at | (x->of_batch | x->of_head | x->of_row | width) * sizeof(float);
    return !x->half && all % LINE == 0 && t->elements * t->n * width >= STREAMED ? STREAMS : SETS;
}

static int is_whole(int what) { return what == FORWARD || what == BACKWARD; }

static long chunks_of(const struct attention *t, int what) { return what >= FORWARD ? 1 : (t->n + CHUNK - 1) / CHUNK; }

/* Numbers that are made of the landmarks of an element. */
static size_t of_landmarks(const struct attention *t) { return t->m * PADDED(t->d) + PADDED(t->m); }

/* How many numbers one thread needs to work: all that NAME(attend) and what it calls take. */
static size_t room_of(const struct attention *t, int what)
{
    const size_t m = t->m, D = PADDED(t->d), E = PADDED(t->e), W = MOST(D, E);
    const size_t blocks = is_whole(what) ? (t->n + BLOCK - 1) / BLOCK : 1;
    const size_t of_element = m * (7 * E + 4 * W) + 2 * PADDED(m) + of_landmarks(t);
    const size_t of_blocks = BLOCK * (4 * D + 4 * E + W + m * (1 + blocks));
    const size_t of_wide_blocks = BLOCK * (5 * D + 6 * E + MOST(D, 2 * E) + 4 * m + 2);
    const size_t of_wide_pass = of_wide_blocks + m * (2 * D + 4 * E + 2 * W) + 2 * PADDED(m);
    const size_t of_solution = 8 * m * E;
    const size_t of_cotangents = what == BACKWARD ? (4 * E + 2 * m) * PADDED(m) + 4 * m * (D + E) : 0;
    const int widens = what == WIDE_SUMS || what == COTANGENTS || (is_whole(what) && t->most);
    return of_element + of_solution + of_cotangents + MOST(of_blocks, BLOCK * m * blocks + widens * of_wide_pass);
}

#if defined(__x86_64__)
#define LANES 16
#define TALL 12
#define STREAM __builtin_ia32_movntps512
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
#define TALL 6
#define STREAM __builtin_ia32_movntps256
#define NAME(x) x##_8
#define TARGET __attribute__((target("avx2,fma")))
#define ZIP_LOW(a, b) __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define ZIP_HIGH(a, b) __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#include "_native_lanes.h"
#endif

#define LANES 4
#define TALL 4
#if defined(__x86_64__)
#define STREAM __builtin_ia32_movntps
#endif
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

/* Ask the system for large pages, where it has them, for memory that is new to the process and is to be written to: to
   get it by pages of 4 KB takes as long as what is computed. */
void lowrank_large_pages(char *at, size_t bytes)
{
#if defined(MADV_HUGEPAGE)
    const size_t page = sysconf(_SC_PAGESIZE), skipped = (page - (size_t)at % page) % page;
    if (bytes > skipped + page) (void)madvise(at + skipped, (bytes - skipped) / page * page, MADV_HUGEPAGE);
#else
    (void)at, (void)bytes;
#endif
}

/* What a team has to do, with vectors of so many lanes: the function of that name for them. */
#if defined(__x86_64__)
#define BY_LANES(name, lanes) ((lanes) == 16 ? name##_16 : (lanes) == 8 ? name##_8 : name##_4)
#else
#define BY_LANES(name, lanes) ((void)(lanes), name##_4)
#endif

struct team {
    void (*work)(const void *task, int what, long item, float *room);
    const void *task;
    size_t room;
    int what;
    long items, next;
};

/* GOMP_parallel of GNU's OpenMP, which brings a team together. */
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);

static void member(void *arg)
{
    struct team *team = arg;
    float *room = malloc(sizeof(float) * team->room);
    if (!room) return;
    for (long i; (i = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->items;)
        team->work(team->task, team->what, i, room);
    FENCE;
    free(room);
}

/* All items, on this thread or on at most so many. Not 0 if none found memory. */
static int run(struct team *team, long threads, parallel *together)
{
    threads = LEAST(threads, team->items);
    if (threads > 1)
        together(member, team, threads, 0);
    else
        member(team);
    return team->next < team->items;
}

/* What is asked for, on one thread or on at most so many, one for each GRAIN of multiplications. */
int lowrank_attend(const struct attention *task, int what, int lanes, long threads, parallel *together)
{
    struct team team = {BY_LANES(attend, lanes), task, room_of(task, what), what, 0, 0};
    team.items = task->elements * chunks_of(task, what);
    const long grains = task->elements * task->n * task->m * (task->d + task->e) / GRAIN + 1;
    return run(&team, LEAST(threads, grains), together);
}

/* A and P, or M. */
int lowrank_core(const struct core *t, int what, int lanes, long threads, parallel *together)
{
    const long m = t->m, d = t->d, S = PADDED(m), products = what == GRAM ? d : 2 * t->count * m;
    const long of_gram = 2 * (d + m + 1) * S + PADDED(2 * m * d), of_inverse = (4 * m + 2 * t->probed) * S;
    struct team team = {BY_LANES(cores, lanes), t, what == GRAM ? of_gram : of_inverse, what, t->elements, 0};
    return run(&team, LEAST(threads, t->elements * m * m * products / GRAIN + 1), together);
}

/* The means, and then the centres. */
int lowrank_segments(const struct segments *t, int what, int lanes, long threads, parallel *together)
{
    const size_t D = PADDED(t->d);
    struct team team = {BY_LANES(segments, lanes), t, FEW * D + 2 * D, what, t->elements * t->m, 0};
    const long grains = t->elements * t->n * t->d / GRAIN + 1;
    if (run(&team, LEAST(threads, grains), together)) return 1;
    team.what = CENTRES, team.items = t->elements, team.next = 0;
    return run(&team, 1, together);
}

/* What the steps lead to, or their cotangents. */
int lowrank_newton(const struct newton *t, int what, int lanes, long threads, parallel *together)
{
    const long S = PADDED(t->m), n = t->m * S, kept = what == STEPS_BACK ? t->count : 1;
    struct team team = {BY_LANES(steps, lanes), t, (2 * kept + 1) * n + 5 * n + 2 * S * BLOCK, what, t->elements, 0};
    return run(&team, LEAST(threads, t->elements * t->count * t->m * t->m * t->m / GRAIN + 1), together);
}

/* The output, or the gradients, with as many threads. */
int lowrank_mlp(struct mlp *t, int back, int lanes, long threads, parallel *together)
{
    const long c = t->width, f = t->hidden, grains = t->rows * c * f / GRAIN + 1;
    struct team team = {BY_LANES(mlp, lanes), t, BLOCK * (2 * PANEL + APART(f)), back ? MLP_PACK_BACK : MLP_PACK, 0, 0};
    threads = LEAST(threads, grains);
    team.items = (f + c) / PANEL;
    if (run(&team, threads, together)) return 1;
    for (t->first = 0; t->first < t->rows; t->first = t->last) {
        t->last = back ? LEAST(t->first + t->blocks * BLOCK, t->rows) : t->rows;
        team.what = back ? MLP_ROWS : MLP_FORWARD, team.next = 0;
        team.items = (t->last - t->first + BLOCK - 1) / BLOCK;
        if (run(&team, threads, together)) return 1;
        team.what = MLP_WEIGHTS, team.next = 0, team.items = f / PANEL;
        if (back && run(&team, threads, together)) return 1;
    }
    return 0;
}

int lowrank_gelu(const struct gelu *t, int back, int lanes, long threads, parallel *together)
{
    struct team team = {BY_LANES(gelus, lanes), t, 2 * BLOCK, back ? GELU_BACK : GELU, (t->count + SPAN - 1) / SPAN, 0};
    return run(&team, threads, together);
}
