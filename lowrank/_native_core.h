/* Of landmarks z, in units of the lengthscale and near the origin, A = k(z, z) and P = A + ridge I; M, an approximate
inverse of P by the steps of _definite.py, whose formulas these are; and landmarks that are means of points. */

/* E and X for the scaled P: X <- c0 X + (c1 E + c2 E^2)X with E = XP. */
TARGET static void NAME(step)(long m, const float *c, const float *p, float *x, float *e, float *g)
{
    const long S = PADDED(m);
    NAME(product)(m, S, m, x, S, 1, p, S, e, S, SETS);
    if (c[2] != 0) NAME(product)(m, S, m, e, S, 1, e, S, g, S, SETS);
    for (long i = 0; i < m * S; i++) g[i] = c[2] != 0 ? c[1] * e[i] + c[2] * g[i] : c[1] * e[i];
    NAME(product)(m, S, m, g, S, 1, x, S, e, S, SETS);
    for (long i = 0; i < m * S; i++) x[i] = c[0] * x[i] + e[i];
}

/* |V - VXP|^2 for the probes V, in rows of m. */
TARGET static float NAME(missed)(const struct core *t, const float *p, const float *x, float *room)
{
    const long m = t->m, S = PADDED(m), k = t->probed;
    float *image = TAKE(k * S), *twice = TAKE(k * S), sum = 0;
    NAME(product)(k, S, m, t->probes, m, 1, x, S, image, S, SETS);
    NAME(product)(k, S, m, image, S, 1, p, S, twice, S, SETS);
    for (long i = 0; i < k; i++)
        for (long j = 0; j < m; j++) {
            const float gap = twice[i * S + j] - t->probes[i * m + j];
            sum += gap * gap;
        }
    return sum;
}

/* A, and P in double precision: where landmarks are close an error of P counts cond(P) times. */
TARGET static void NAME(gram)(const struct core *t, long item, float *room)
{
    const long m = t->m, d = t->d, S = PADDED(m);
    const float *at = t->z + item * m * d, *centre = t->centre + item * d;
    double *z = (double *)TAKE(2 * m * d), *z_t = (double *)TAKE(2 * d * S), *product = (double *)TAKE(2 * m * S);
    double *half = (double *)TAKE(2 * S);
    double *system = t->system + item * m * m;
    float *a = t->a + item * m * m;
    for (long j = 0; j < m; j++)
        for (long k = 0; k < d; k++) z[j * d + k] = ((double)at[j * d + k] - centre[k]) * t->s;
    for (long k = 0; k < d; k++)
        for (long j = 0; j < S; j++) z_t[k * S + j] = j < m ? z[j * d + k] : 0;
    NAME(wide_product)(m, S, d, z, d, z_t, S, product, S);
    /* The squares are the product's own, which makes k(z, z) = 1. */
    for (long j = 0; j < S; j++) half[j] = j < m ? 0.5 * product[j * S + j] : 0;
    for (long i = 0; i < m; i++) {
        double *row = product + i * S;
        for (long j = 0; j < S; j += LANES / 2) {
            const wide y = *(wide *)(row + j) - (*(wide *)(half + j) + half[i]);
            *(wide *)(row + j) = NAME(wide_exp)((wide)((wide_bits)y & ~(y > (wide){0})));
        }
        for (long j = 0; j < m; j++) a[i * m + j] = system[i * m + j] = row[j];
        system[i * m + i] += t->ridge;
    }
}

/* M, and whether it is an inverse. */
TARGET static void NAME(invert)(const struct core *t, long item, float *room)
{
    const long m = t->m, S = PADDED(m);
    float *p = TAKE(m * S), *x = TAKE(m * S), *e = TAKE(m * S), *g = TAKE(m * S);
    NAME(pad)(m, m, t->a + item * m * m, p);
    for (long i = 0; i < m * S; i++) p[i] *= t->scale;
    for (long i = 0; i < m; i++) p[i * S + i] += t->scale * (float)t->ridge;
    /* The first step starts from a multiple of I, and so is in powers of P. */
    const float *c = t->steps;
    if (c[2] != 0) NAME(product)(m, S, m, p, S, 1, p, S, e, S, SETS);
    for (long i = 0; i < m * S; i++) x[i] = c[2] != 0 ? c[1] * p[i] + c[2] * e[i] : c[1] * p[i];
    for (long i = 0; i < m; i++) x[i * S + i] += c[0];
    for (long k = 1; k < t->count; k++) NAME(step)(m, c + 3 * k, p, x, e, g);
    t->valid[item] = NAME(missed)(t, p, x, room) <= t->most * t->most;
    for (long i = 0; i < m * S; i++) x[i] *= t->scale;
    NAME(unpad)(m, m, x, t->inverse + item * m * m);
}

/* One item: an element of the batch. */
TARGET static void NAME(cores)(const void *task, int what, long item, float *room)
{
    if (what == GRAM) NAME(gram)(task, item, room);
    else NAME(invert)(task, item, room);
}

/* One item: a segment of an element, or an element. FEW points are added as floats, and such sums in double precision. */
TARGET static void NAME(segments)(const void *task, int what, long item, float *room)
{
    const struct segments *t = task;
    const long m = t->m, d = t->d, D = PADDED(d), element = item % t->elements, j = item / t->elements;
    double *sums = (double *)TAKE(2 * D);
    memset(sums, 0, sizeof(double) * D);
    if (what == CENTRES) {
        for (long i = element * m * d; i < (element + 1) * m * d; i += d)
            for (long k = 0; k < d; k++) sums[k] += t->z[i + k];
        for (long k = 0; k < d; k++) t->centre[element * d + k] = sums[k] / m;
        return;
    }
    const long first = j * (t->n / m) + LEAST(j, t->n % m), last = first + t->n / m + (j < t->n % m);
    for (long r = first; r < last; r += FEW) {
        const struct place p = {element / t->heads, element % t->heads, element, r, LEAST(FEW, last - r)};
        const struct block rows = NAME(read)(&t->points, p, d, room);
        for (long k = 0; k < D; k += LANES) {
            vec sum = {0};
            for (long i = 0; i < p.count; i++) sum += *(const vec *)(rows.at + i * rows.stride + k);
            for (int i = 0; i < LANES; i++) sums[k + i] += sum[i];
        }
    }
    for (long k = 0; k < d; k++) t->z[(element * m + j) * d + k] = sums[k] / (last - first);
}
