/* What _native_kernels.c computes, by vectors of LANES floats: included once for each width, under names of its own.
   Here are the vectors and what is made of them alone; what for is in the files at the end. */

typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(bits) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t NAME(ubits) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float NAME(aligned) __attribute__((vector_size(4 * LANES), may_alias));
typedef float NAME(part) __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef double NAME(wide) __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
typedef int64_t NAME(wide_bits) __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
typedef uint64_t NAME(wide_ubits) __attribute__((vector_size(4 * LANES), aligned(8), may_alias));
#define vec NAME(vec)
#define bits NAME(bits)
#define ubits NAME(ubits)
#define wide NAME(wide)
#define wide_bits NAME(wide_bits)
#define wide_ubits NAME(wide_ubits)

/* To memory past the caches, where it is aligned: what was there is not read, and nothing makes room for it. */
INLINE TARGET void NAME(stream)(float *to, vec x)
{
#if defined(__clang__)
    __builtin_nontemporal_store((NAME(aligned))x, (NAME(aligned) *)to);
#elif defined(STREAM)
    STREAM(to, (NAME(aligned))x);
#else
    *(vec *)to = x;
#endif
}

/* O[i, n] = sum over k < K of A[i*si + k*sk] B[k*sb + n], for i < I and n < V*LANES, a tile that stays in the registers,
   or what this ADDs to what was there, or STREAMS past it. */
INLINE TARGET void NAME(tile)(int I, int V, long K, const float *A, long si, long sk, const float *B, long sb, float *O,
                              long so, int how)
{
    vec o[TALL][2], b[2];
    UNROLL for (int i = 0; i < I; i++)
        UNROLL for (int v = 0; v < V; v++) o[i][v] = (vec){0};
    for (long k = 0; k < K; k++) {
        UNROLL for (int v = 0; v < V; v++) b[v] = *(const vec *)(B + k * sb + v * LANES);
        UNROLL for (int i = 0; i < I; i++) {
            const float a = A[i * si + k * sk];
            UNROLL for (int v = 0; v < V; v++) o[i][v] += a * b[v];
        }
    }
    if (how == STREAMS)
        UNROLL for (int i = 0; i < I; i++)
            UNROLL for (int v = 0; v < V; v++) NAME(stream)(O + i * so + v * LANES, o[i][v]);
    else
        UNROLL for (int i = 0; i < I; i++)
            UNROLL for (int v = 0; v < V; v++) {
                vec *to = (vec *)(O + i * so + v * LANES);
                if (how == ADDS) o[i][v] += *to;
                *to = o[i][v];
            }
}

/* Of M rows as few strips as tiles are tall, as even as they can be: what is done for each, of I rows from i on, I being
   known to the compiler. */
#define CASE(rows, what) case rows: { const int I = rows; what; } break;
#if TALL > 4
#define CASES_TO_6(what) CASE(5, what) CASE(6, what)
#else
#define CASES_TO_6(what)
#endif
#if TALL > 6
#define CASES_TO_12(what) CASE(7, what) CASE(8, what) CASE(9, what) CASE(10, what) CASE(11, what) CASE(12, what)
#else
#define CASES_TO_12(what)
#endif
#define BY_STRIPS(M, what)                                                                        \
    for (long strips = ((M) + TALL - 1) / TALL, s = 0, i = 0, tall; s < strips; s++, i += tall) { \
        tall = ((M) - i + strips - s - 1) / (strips - s);                                         \
        switch (tall) {                                                                           \
            CASE(1, what) CASE(2, what) CASE(3, what) CASE(4, what)                               \
            CASES_TO_6(what) CASES_TO_12(what)                                                    \
        }                                                                                         \
    }

/* The same of M rows. */
INLINE TARGET void NAME(tiles)(long M, int V, long K, const float *A, long si, long sk, const float *B, long sb, float *O,
                               long so, int how)
{
    BY_STRIPS(M, NAME(tile)(I, V, K, A + i * si, si, sk, B, sb, O + i * so, so, how))
}

/* The same of N columns, N a multiple of LANES. Of a long sum DEEP terms are taken for all rows, and then the next: what
   they need of B stays in the nearest cache, and such sums do not stream. */
TARGET static void NAME(product)(long M, long N, long K, const float *A, long si, long sk, const float *B, long sb,
                                 float *O, long so, int how)
{
    const long parts = MOST(1, (K + DEEP - 1) / DEEP);
    for (long n = 0, breadth; n < N; n += breadth) {
        breadth = N - n >= 2 * LANES ? 2 * LANES : LANES;
        for (long part = 0; part < parts; part++) {
            const long k = K * part / parts, deep = K * (part + 1) / parts - k;
            const int now = part ? ADDS : parts > 1 && how == STREAMS ? SETS : how;
            const float *a = A + k * sk, *b = B + k * sb + n;
            if (breadth > LANES)
                NAME(tiles)(M, 2, deep, a, si, sk, b, sb, O + n, so, now);
            else
                NAME(tiles)(M, 1, deep, a, si, sk, b, sb, O + n, so, now);
        }
    }
}

/* exp(y) = 2^n exp(r), |r| <= log(2)/2, for |y| <= -LOWEST: (exp(r) - 1)/r to 2e-9, by weighted least squares. */
INLINE TARGET vec NAME(exp_of)(vec y)
{
    const vec shifted = y * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: the lowest bits are the integer nearest to y/log 2 */
    const vec n = shifted - 12582912.0f, r = y - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = (vec){0} + 1.3843653430e-03f;
    p = p * r + 8.3741553316e-03f;
    p = p * r + 4.1668002038e-02f;
    p = p * r + 1.6666431262e-01f;
    p = p * r + 4.9999994210e-01f;
    p = p * r + 1.0000000322e+00f;
    return (vec)((ubits)(p * r + 1.0f) + ((ubits)shifted << 23));
}

/* exp(y) to 1e-12, or 0 below LOWEST, for y <= 0; what is no number stays so. */
INLINE TARGET wide NAME(wide_exp)(wide y)
{
    const wide shifted = y * 1.4426950408889634 + 6755399441055744.0; /* 1.5 * 2^52, as above */
    const wide n = shifted - 6755399441055744.0, r = y - n * 0.6931471805599453;
    wide p = (wide){0} + 1.0 / 3628800; /* Taylor's */
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    const wide_bits scaled = (wide_bits)((wide_ubits)p + ((wide_ubits)shifted << 52)), unknown = y != y;
    return (wide)((scaled & (y >= (wide){0} + LOWEST) & ~unknown) | ((wide_bits)y & unknown));
}

/* exp(min(x, 0)), or 0 below LOWEST. What is no number stays so if careful. */
INLINE TARGET vec NAME(exp)(vec x, int careful)
{
    const bits known = x >= (vec){0} + LOWEST, unknown = x != x;
    const bits scaled = (bits)NAME(exp_of)((vec)((bits)x & ((bits)x >> 31))) & known;
    if (careful) return (vec)((scaled & ~unknown) | ((bits)x & unknown));
    return (vec)scaled;
}

/* What holds is x, and what does not y. */
INLINE TARGET vec NAME(choose)(bits holds, vec x, vec y) { return (vec)((holds & (bits)x) | (~holds & (bits)y)); }

/* n numbers in double precision, n a multiple of LANES. */
TARGET static void NAME(widen)(long n, const float *x, double *out)
{
    for (long i = 0; i < n; i += LANES / 2)
        *(wide *)(out + i) = __builtin_convertvector(*(const NAME(part) *)(x + i), wide);
}

/* AB in double precision: I rows of A, in rows of sa, and LANES columns. */
INLINE TARGET void NAME(wide_tile)(int I, long K, const double *A, long sa, const double *B, long sb, double *O, long so)
{
    wide o[TALL][2], b[2];
    UNROLL for (int i = 0; i < I; i++)
        UNROLL for (int v = 0; v < 2; v++) o[i][v] = (wide){0};
    for (long k = 0; k < K; k++) {
        UNROLL for (int v = 0; v < 2; v++) b[v] = *(const wide *)(B + k * sb + v * LANES / 2);
        UNROLL for (int i = 0; i < I; i++) {
            const double a = A[i * sa + k];
            UNROLL for (int v = 0; v < 2; v++) o[i][v] += a * b[v];
        }
    }
    UNROLL for (int i = 0; i < I; i++)
        UNROLL for (int v = 0; v < 2; v++) *(wide *)(O + i * so + v * LANES / 2) = o[i][v];
}

/* The same of M rows and N columns, N a multiple of LANES. */
TARGET static void NAME(wide_product)(long M, long N, long K, const double *A, long sa, const double *B, long sb,
                                      double *O, long so)
{
    for (long n = 0; n < N; n += LANES)
        BY_STRIPS(M, NAME(wide_tile)(I, K, A + i * sa, sa, B + n, sb, O + i * so + n, so))
}

/* The transpose, (N, count) in rows of BLOCK, of rows (count, N), N a multiple of LANES, and 0 up to PADDED(count). */
TARGET static void NAME(transpose)(long count, long N, struct block rows, float *out)
{
    for (long r = 0; r < PADDED(count); r += LANES)
        for (long n = 0; n < N; n += LANES) {
            vec a[LANES], b[LANES];
            if (count - r >= LANES)
                UNROLL for (int i = 0; i < LANES; i++) a[i] = *(const vec *)(rows.at + (r + i) * rows.stride + n);
            else
                for (int i = 0; i < LANES; i++)
                    a[i] = r + i < count ? *(const vec *)(rows.at + (r + i) * rows.stride + n) : (vec){0};
            /* Each stage rotates the bits of (row, column) by one: after all of them rows are columns. */
            UNROLL for (int stage = 1; stage < LANES; stage *= 2) {
                UNROLL for (int i = 0; i < LANES / 2; i++) {
                    b[2 * i] = ZIP_LOW(a[i], a[i + LANES / 2]);
                    b[2 * i + 1] = ZIP_HIGH(a[i], a[i + LANES / 2]);
                }
                UNROLL for (int i = 0; i < LANES; i++) a[i] = b[i];
            }
            UNROLL for (int i = 0; i < LANES; i++) *(vec *)(out + (n + i) * BLOCK + r) = a[i];
        }
}

/* A packed matrix (rows, width) in padded rows, and back. */
TARGET static void NAME(pad)(long rows, long width, const float *x, float *out)
{
    for (long i = 0; i < rows; i++, x += width, out += PADDED(width)) {
        for (long k = 0; k < width; k++) out[k] = x[k];
        for (long k = width; k < PADDED(width); k++) out[k] = 0;
    }
}

TARGET static void NAME(unpad)(long rows, long width, const float *x, float *out)
{
    for (long i = 0; i < rows; i++, x += PADDED(width), out += width)
        for (long k = 0; k < width; k++) out[k] = x[k];
}

/* The power of two near the largest of n numbers, a multiple of LANES, by which products are exact; 1 where that is 0 or
   no number. */
TARGET static float NAME(power)(long n, const float *x)
{
    vec most = {0};
    for (long i = 0; i < n; i += LANES) {
        const vec size = (vec)(*(const bits *)(x + i) & 0x7fffffff);
        most = NAME(choose)(size <= most, most, size);
    }
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = most[i] <= largest ? largest : most[i];
    int exponent;
    frexpf(largest, &exponent);
    return largest > 0 && isfinite(largest) ? ldexpf(1, MOST(-120, LEAST(120, exponent))) : 1;
}

TARGET static void NAME(accumulate)(long n, const float *x, double *sums)
{
    for (long i = 0; i < n; i++) sums[i] += x[i];
}

#include "_native_attention.h"
#include "_native_core.h"
#include "_native_mlp.h"
#include "_native_newton.h"

#undef vec
#undef bits
#undef ubits
#undef wide
#undef wide_bits
#undef wide_ubits
#undef NAME
#undef TARGET
#undef LANES
#undef TALL
#undef CASE
#undef CASES_TO_6
#undef CASES_TO_12
#undef BY_STRIPS
#undef ZIP_LOW
#undef ZIP_HIGH
#undef STREAM
