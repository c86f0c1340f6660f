/* GELU(xA' + a)B' + b of tokens x and its cotangents. The hidden layer of a block of tokens, wide as it is, is made and
used in the caches, and on the way back made again. There some blocks are a chunk: first its rows, on each thread other
blocks, then what they add to the gradients of the weights, on each thread other panels. */

/* 1/d for d in [1, 2]: 1 - pd of the quadratic p is a Chebyshev polynomial of at most 1/99, and its fourth power what the
   last two factors leave. A division takes as long as all else here. */
INLINE TARGET vec NAME(reciprocal)(vec d)
{
    const vec p = (d * 0.323232323f - 1.45454545f) * d + 2.12121212f, rest = 1.0f - d * p, q = p + p * rest;
    return q + q * (rest * rest);
}

/* GELU(u) = u s(y), s the logistic function and y = BETA u + BETA GAMMA u^3, and its derivative. */
INLINE TARGET vec NAME(gelu)(vec u, vec *slope)
{
    const vec u2 = u * u, y = u * (u2 * (BETA * GAMMA) + BETA);
    const bits sign = (bits)(-(vec){0}), below = (bits)y >> 31;
    const vec e = NAME(exp)((vec)((bits)y | sign), 0), r = NAME(reciprocal)(1.0f + e), er = e * r;
    const bits both = (bits)r ^ (bits)er, s = (bits)r ^ (both & below); /* r = s(|y|), er = 1 - r */
    const vec h = u * (vec)s;
    *slope = (vec)s + h * (vec)(both ^ s) * (u2 * (3 * BETA * GAMMA) + BETA);
    return h;
}

/* Some numbers of an array as floats, and back. */
TARGET static void NAME(load)(const void *from, long half, long first, long count, float *to)
{
    if (half)
        for (long k = 0; k < count; k++) to[k] = from_bfloat16(((const uint16_t *)from)[first + k]);
    else
        memcpy(to, (const float *)from + first, sizeof(float) * count);
}

TARGET static void NAME(store)(const float *from, long half, long first, long count, void *to)
{
    if (half)
        for (long k = 0; k < count; k++) ((uint16_t *)to)[first + k] = to_bfloat16(from[k]);
    else
        memcpy((float *)to + first, from, sizeof(float) * count);
}

/* One item: SPAN numbers of the array. */
TARGET static void NAME(gelus)(const void *task, int what, long item, float *room)
{
    const struct gelu *t = task;
    float *u = TAKE(BLOCK), *g = TAKE(BLOCK);
    vec slope;
    for (long k = 0; k < BLOCK; k++) u[k] = 0;
    for (long first = item * SPAN, last = LEAST(first + SPAN, t->count); first < last; first += BLOCK) {
        const long count = LEAST(BLOCK, last - first);
        NAME(load)(t->u, t->half, first, count, u);
        if (what == GELU_BACK) NAME(load)(t->g, t->half, first, count, g);
        for (long k = 0; k < count; k += LANES) {
            *(vec *)(u + k) = NAME(gelu)(*(vec *)(u + k), &slope);
            if (what == GELU_BACK) *(vec *)(u + k) = *(vec *)(g + k) * slope;
        }
        NAME(store)(u, t->half, first, count, t->out);
    }
}

/* The columns of a panel of a matrix (rows, columns), in rows of PANEL. */
TARGET static void NAME(pack)(const float *from, long rows, long columns, long panel, float *to)
{
    from += panel * PANEL, to += panel * PANEL * rows;
    for (long k = 0; k < rows; k++)
        for (long j = 0; j < PANEL; j++) to[k * PANEL + j] = from[k * columns + j];
}

/* The same of its transpose. */
TARGET static void NAME(pack_rows)(const float *from, long columns, long panel, float *to)
{
    from += panel * PANEL * columns, to += panel * PANEL * columns;
    for (long k = 0; k < columns; k++)
        for (long j = 0; j < PANEL; j++) to[k * PANEL + j] = from[j * columns + k];
}

/* The output for some rows. */
TARGET static void NAME(mlp_forward)(const struct mlp *t, long first, long count, float *room)
{
    const long c = t->width, f = t->hidden, stride = APART(f);
    const float *x = t->x + first * c;
    float *out = t->out + first * c, *u = TAKE(BLOCK * PANEL), *h = TAKE(BLOCK * stride);
    vec slope;
    for (long j = 0; j < f; j += PANEL) {
        NAME(product)(count, PANEL, c, x, c, 1, t->w1_rows + j * c, PANEL, u, PANEL, SETS);
        for (long i = 0; i < count; i++)
            for (long k = 0; k < PANEL; k += LANES)
                *(vec *)(h + i * stride + j + k) =
                    NAME(gelu)(*(vec *)(u + i * PANEL + k) + *(const vec *)(t->b1 + j + k), &slope);
    }
    for (long i = 0; i < count; i++)
        for (long k = 0; k < c; k++) out[i * c + k] = t->residual ? t->b2[k] + x[i * c + k] : t->b2[k];
    for (long j = 0; j < c; j += PANEL)
        NAME(product)(count, PANEL, f, h, stride, 1, t->w2_rows + j * f, PANEL, out + j, c, ADDS);
}

/* x_bar of some rows, which are a block of a chunk, and what the gradients of the weights are products with: the hidden
   layer, in panels, and its cotangent before the activation, whose sums over these rows are kept as well. */
TARGET static void NAME(mlp_rows)(const struct mlp *t, long block, long first, long count, float *room)
{
    const long c = t->width, f = t->hidden, stride = APART(f);
    const float *x = t->x + first * c, *g = t->g + first * c;
    float *u = TAKE(BLOCK * PANEL), *h_bar = TAKE(BLOCK * PANEL), *rows = TAKE(BLOCK * stride);
    float *h = t->h + block * BLOCK * f, *u_bar = t->u_bar + block * BLOCK * f, *x_bar = t->x_bar + first * c;
    for (long j = 0; j < f; j += PANEL, h += BLOCK * PANEL, u_bar += BLOCK * PANEL) {
        NAME(product)(count, PANEL, c, x, c, 1, t->w1_rows + j * c, PANEL, u, PANEL, SETS);
        NAME(product)(count, PANEL, c, g, c, 1, t->w2_columns + j * c, PANEL, h_bar, PANEL, SETS);
        for (long k = 0; k < PANEL; k += LANES) {
            const vec b = *(const vec *)(t->b1 + j + k);
            vec sum = {0}, slope;
            for (long i = 0; i < count; i++) {
                const long at = i * PANEL + k;
                *(vec *)(h + at) = NAME(gelu)(*(vec *)(u + at) + b, &slope);
                slope *= *(vec *)(h_bar + at);
                *(vec *)(u_bar + at) = *(vec *)(rows + i * stride + j + k) = slope;
                sum += slope;
            }
            *(vec *)(t->sums + block * f + j + k) = sum;
        }
    }
    for (long j = 0; j < c; j += PANEL)
        NAME(product)(count, PANEL, f, rows, stride, 1, t->w1_columns + j * f, PANEL, x_bar + j, c, SETS);
    for (long k = 0; t->residual && k < count * c; k++) x_bar[k] += g[k];
}

/* The gradients of the weights and biases of a panel of the hidden layer: what the rows of a chunk add to them. */
TARGET static void NAME(mlp_weights)(const struct mlp *t, long panel)
{
    const long c = t->width, f = t->hidden, j = panel * PANEL;
    for (long r = t->first, block = 0; r < t->last; r += BLOCK, block++) {
        const long count = LEAST(BLOCK, t->last - r), at = (block * f + j) * BLOCK;
        NAME(product)(PANEL, c, count, t->u_bar + at, 1, PANEL, t->x + r * c, c, t->w1_bar + j * c, c, r > 0 ? ADDS : SETS);
        NAME(product)(c, PANEL, count, t->g + r * c, 1, c, t->h + at, PANEL, t->w2_bar + j, f, r > 0 ? ADDS : SETS);
        for (long k = j; k < j + PANEL; k++) t->b1_bar[k] = (r > 0 ? t->b1_bar[k] : 0) + t->sums[block * f + k];
    }
}

/* One item: a panel of weights or of their gradients, or a block of rows. */
TARGET static void NAME(mlp)(const void *task, int what, long item, float *room)
{
    const struct mlp *t = task;
    const long c = t->width, f = t->hidden, panels = f / PANEL;
    const long first = t->first + item * BLOCK, count = LEAST(BLOCK, t->last - first);
    if (what == MLP_PACK) {
        if (item < panels) NAME(pack_rows)(t->w1, c, item, t->w1_rows);
        else NAME(pack_rows)(t->w2, f, item - panels, t->w2_rows);
    } else if (what == MLP_PACK_BACK) {
        if (item < panels) NAME(pack_rows)(t->w1, c, item, t->w1_rows), NAME(pack)(t->w2, c, f, item, t->w2_columns);
        else NAME(pack)(t->w1, f, c, item - panels, t->w1_columns);
    } else if (what == MLP_FORWARD) NAME(mlp_forward)(t, first, count, room);
    else if (what == MLP_ROWS) NAME(mlp_rows)(t, item, first, count, room);
    else NAME(mlp_weights)(t, item);
}
