/* Of landmarks z, in units of the lengthscale and near the origin, A = k(z, z) and P = A + ridge I; and M, an approximate
inverse of P by the steps of _definite.py, whose formulas these are. */

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

/* z = h + l with h of so few digits that products of two are exact, and u = h + l/2. */
TARGET static void NAME(split)(long n, float large, const float *z, float *h, float *l, float *u)
{
    for (long i = 0; i < n; i++) h[i] = (z[i] + large) - large, l[i] = z[i] - h[i], u[i] = h[i] + 0.5f * l[i];
}

/* A and P. Where landmarks are close an error of A counts cond(P) times, and that of an exponent by the expansion is
   one of A. So z'z = h'h + (l'u + u'l), and what the exponent rounds away is a factor. */
TARGET static void NAME(gram)(const struct core *t, long item, float *room)
{
    const long m = t->m, d = t->d, S = PADDED(m), D = PADDED(d), B = BLOCK;
    float *z = TAKE(m * D), *h = TAKE(m * D), *l = TAKE(m * D), *u = TAKE(m * D), *half = TAKE(2 * S);
    float *z_t = TAKE(D * B), *h_t = TAKE(D * B), *l_t = TAKE(D * B), *u_t = TAKE(D * B);
    float *high = TAKE(m * S), *low = TAKE(m * S);
    NAME(pad)(m, d, t->z + item * m * d, z);
    NAME(transpose)(m, D, (struct block){z, D}, z_t);
    const float large = 1.5f * (1 << 15) * NAME(power)(m * D, z); /* its last digit is the last of h */
    NAME(split)(m * D, large, z, h, l, u);
    for (long k = 0; k < d; k++) NAME(split)(S, large, z_t + k * B, h_t + k * B, l_t + k * B, u_t + k * B);
    NAME(product)(m, S, d, h, D, 1, h_t, B, high, S, SETS);
    NAME(product)(m, S, d, l, D, 1, u_t, B, low, S, SETS);
    NAME(product)(m, S, d, u, D, 1, l_t, B, low, S, ADDS);
    /* The squares are the products' own, which makes k(z, z) = 1. */
    float *half_high = half, *half_low = half + S;
    for (long j = 0; j < S; j++) {
        half_high[j] = j < m ? 0.5f * high[j * S + j] : 0;
        half_low[j] = j < m ? 0.5f * low[j * S + j] : 0;
    }
    for (long i = 0; i < m; i++)
        for (long j = 0; j < S; j += LANES) {
            const vec a = *(vec *)(high + i * S + j) - (*(vec *)(half_high + j) + half_high[i]);
            const vec b = *(vec *)(low + i * S + j) - (*(vec *)(half_low + j) + half_low[i]);
            const vec y = a + b, added = y - a, lost = (a - (y - added)) + (b - added), k = NAME(exp)(y, 1);
            *(vec *)(high + i * S + j) = k + k * NAME(choose)(lost == lost, lost, (vec){0});
        }
    NAME(unpad)(m, m, high, t->a + item * m * m);
    for (long i = 0; i < m; i++) high[i * S + i] += t->ridge;
    NAME(unpad)(m, m, high, t->system + item * m * m);
}

/* M, and whether it is an inverse. */
TARGET static void NAME(invert)(const struct core *t, long item, float *room)
{
    const long m = t->m, S = PADDED(m);
    float *p = TAKE(m * S), *x = TAKE(m * S), *e = TAKE(m * S), *g = TAKE(m * S);
    NAME(pad)(m, m, t->a + item * m * m, p);
    for (long i = 0; i < m * S; i++) p[i] *= t->scale;
    for (long i = 0; i < m; i++) p[i * S + i] += t->scale * t->ridge;
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
