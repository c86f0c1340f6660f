/* Newton's textbook steps X <- 2X - XAX of square matrices, and their cotangents, by the formulas of _gradients.py: all
steps of a matrix in one call, in the nearer caches, those of the way back from iterates that are made again. */

/* E = XA and the next X. */
TARGET static void NAME(textbook_step)(long m, const float *x, const float *a, float *e, float *next)
{
    const long S = PADDED(m);
    NAME(product)(m, S, m, x, S, 1, a, S, e, S, SETS);
    NAME(product)(m, S, m, e, S, 1, x, S, next, S, SETS);
    for (long i = 0; i < m * S; i++) next[i] = 2 * x[i] - next[i];
}

/* X_bar and A_bar for the cotangent G in g. What is smaller than TINY is taken for 0: through converged steps G falls
   with the square of the residual. */
TARGET static void NAME(steps_back)(const struct newton *t, const float *a, const float *x, const float *e, float *g,
                                    float *a_bar, float *room)
{
    const long m = t->m, S = PADDED(m), n = m * S;
    float *a_t = TAKE(S * BLOCK), *x_t = TAKE(S * BLOCK), *h = TAKE(n), *next = TAKE(n);
    const float scale = NAME(power)(n, g);
    NAME(transpose)(m, S, (struct block){a, S}, a_t);
    memset(a_bar, 0, sizeof(float) * n);
    for (long i = 0; i < n; i++) g[i] = fabsf(g[i] / scale) < TINY ? 0 : g[i] / scale;
    for (long k = t->count - 1; k >= 0; k--) {
        NAME(transpose)(m, S, (struct block){x + k * n, S}, x_t);
        NAME(product)(m, S, m, g, S, 1, x_t, BLOCK, h, S, SETS);
        NAME(product)(m, S, m, x + k * n, 1, S, h, S, a_bar, S, ADDS);
        NAME(product)(m, S, m, e + k * n, 1, S, g, S, next, S, SETS);
        NAME(product)(m, S, m, h, S, 1, a_t, BLOCK, next, S, ADDS);
        for (long i = 0; i < n; i++) {
            const float of_x = 2 * g[i] - next[i];
            g[i] = fabsf(of_x) < TINY ? 0 : of_x;
        }
    }
    for (long i = 0; i < n; i++) g[i] *= scale, a_bar[i] *= -scale;
}

/* One item: a matrix. */
TARGET static void NAME(steps)(const void *task, int what, long item, float *room)
{
    const struct newton *t = task;
    const long m = t->m, S = PADDED(m), n = m * S, at = item * m * m, kept = what == STEPS_BACK ? t->count : 1;
    float *a = TAKE(n), *x = TAKE((kept + 1) * n), *e = TAKE(kept * n), *g = TAKE(n), *a_bar = TAKE(n), *last = x;
    NAME(pad)(m, m, t->a + at, a);
    NAME(pad)(m, m, t->x + at, x);
    for (long k = 0; k < t->count; k++) {
        const long place = what == STEPS_BACK ? k : 0;
        float *before = what == STEPS_BACK ? x + k * n : x + k % 2 * n;
        last = what == STEPS_BACK ? x + (k + 1) * n : x + (k + 1) % 2 * n;
        NAME(textbook_step)(m, before, a, e + place * n, last);
    }
    if (what == STEPS)
        NAME(unpad)(m, m, last, t->out + at);
    else {
        NAME(pad)(m, m, t->g + at, g);
        NAME(steps_back)(t, a, x, e, g, a_bar, room);
        NAME(unpad)(m, m, g, t->x_bar + at);
        NAME(unpad)(m, m, a_bar, t->a_bar + at);
    }
}
