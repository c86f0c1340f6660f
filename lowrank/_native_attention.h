/* Sums C'v, products Cw and their cotangents, C = exp(-|x - z|^2/2), x = (q - c)s, by the formulas of _attend.py.

A block of C lies transposed, a row for each landmark: then every product has vectors along an axis that is long or even,
one routine serves them all, and an odd number of landmarks costs nothing.

The unit of work is an element of the batch whose part of C is small ("whole"), which is kept from the sums to the
product, M and the corrections being applied in between; or CHUNK points of an element, whose partial sums the caller
adds. */

/* Rows of an array, as floats in padded rows; where they are such they stay where they are. */
TARGET static struct block NAME(read)(const struct rows *x, struct place p, long width, float *room)
{
    const long stride = PADDED(width);
    if (!x->half && width == stride) return (struct block){row_of(x, p), x->of_row};
    for (long i = 0; i < p.count; i++, p.row++) {
        const void *from = row_of(x, p);
        float *to = room + i * stride;
        if (x->half)
            for (long k = 0; k < width; k++) to[k] = from_bfloat16(((const uint16_t *)from)[k]);
        else
            for (long k = 0; k < width; k++) to[k] = ((const float *)from)[k];
        for (long k = width; k < stride; k++) to[k] = 0;
    }
    return (struct block){room, stride};
}

TARGET static void NAME(write)(const struct rows *x, struct place p, long width, const float *from)
{
    for (long i = 0; i < p.count; i++, p.row++, from += PADDED(width)) {
        void *to = row_of(x, p);
        if (x->half)
            for (long k = 0; k < width; k++) ((uint16_t *)to)[k] = to_bfloat16(from[k]);
        else
            for (long k = 0; k < width; k++) ((float *)to)[k] = from[k];
    }
}

/* The same one after the other in the room: a product with many rows that are far from each other would find no place for
   them in the nearest cache, whose lines are chosen by what is last in an address. */
TARGET static struct block NAME(gather)(const struct rows *x, struct place p, long width, float *room)
{
    const long stride = PADDED(width);
    const struct block rows = NAME(read)(x, p, width, room);
    if (rows.stride == stride) return rows;
    for (long i = 0; i < p.count; i++)
        for (long k = 0; k < width; k += LANES)
            *(vec *)(room + i * stride + k) = *(const vec *)(rows.at + i * rows.stride + k);
    return (struct block){room, stride};
}

/* Cw to rows of an array, for C transposed, (m, BLOCK), and w (m, width) in padded rows. */
TARGET static void NAME(apply)(const struct rows *x, struct place p, long width, long m, const float *c, const float *w,
                               int how, float *room)
{
    const long stride = PADDED(width);
    if (!x->half && width == stride)
        NAME(product)(p.count, stride, m, c, 1, BLOCK, w, stride, row_of(x, p), x->of_row, how);
    else {
        NAME(product)(p.count, stride, m, c, 1, BLOCK, w, stride, room, stride, SETS);
        NAME(write)(x, p, width, room);
    }
}

/* The points x in padded rows. */
TARGET static void NAME(points)(const struct attention *t, struct place p, float *x)
{
    const long d = t->d, stride = PADDED(d);
    const float *centre = t->centre + p.element * d, scale = t->scale;
    const struct block q = NAME(read)(&t->q, p, d, x);
    for (long i = 0; i < p.count; i++) {
        const float *from = q.at + i * q.stride;
        float *to = x + i * stride;
        long k = 0;
        for (; k + LANES <= d; k += LANES)
            *(vec *)(to + k) = (*(const vec *)(from + k) - *(const vec *)(centre + k)) * scale;
        for (; k < d; k++) to[k] = (from[k] - centre[k]) * scale;
        for (; k < stride; k++) to[k] = 0;
    }
}

/* q_bar = s(Hz - diag(H1)x) to memory, for Hz in the room for points. */
TARGET static void NAME(less_points)(const struct attention *t, struct place p, const float *of_rows, const float *x,
                                     float *hz)
{
    const long d = t->d, stride = PADDED(d);
    const struct rows *out = &t->q_bar;
    float *at = row_of(out, p);
    const int direct = !out->half, streams = way_of(out, t, d) == STREAMS;
    for (long i = 0; i < p.count; i++, x += stride, hz += stride) {
        float *to = direct ? at + i * out->of_row : hz;
        if (streams)
            for (long k = 0; k < d; k += LANES)
                NAME(stream)(to + k, t->scale * (*(vec *)(hz + k) - of_rows[i] * *(const vec *)(x + k)));
        else
            for (long k = 0; k < d; k++) to[k] = t->scale * (hz[k] - of_rows[i] * x[k]);
    }
    if (!direct) NAME(write)(out, p, d, hz - p.count * stride);
}

/* Landmarks z = (landmark - c)s of an element, in padded rows, and |z|^2/2; whether one is so far out that care is needed,
   and whether some are near others. One that is near an earlier one has the nearest for its parent, by number, the step
   z - parent, of which rounding leaves as little wrong as it is small, and the fall -(|z|^2 - |parent|^2)/2; the others
   have the parent -1 and the step z. */
struct NAME(landmarks) {
    float *z, *half_z, *step, *fall;
    int32_t *parent, *far, *near;
};

/* Where they are in memory for them. */
TARGET static struct NAME(landmarks) NAME(landmarks_at)(const struct attention *t, float *room)
{
    const long m = t->m, D = PADDED(t->d);
    float *z = TAKE(m * D), *step = TAKE(m * D), *half_z = TAKE(m), *fall = TAKE(m);
    int32_t *parent = (int32_t *)TAKE(m), *flags = (int32_t *)TAKE(2);
    return (struct NAME(landmarks)){z, half_z, step, fall, parent, flags, flags + 1};
}

/* For each landmark the nearest of those before it, if that is near. */
TARGET static void NAME(parents)(const struct attention *t, long element, const struct NAME(landmarks) *y, float *room)
{
    const long m = t->m, d = t->d, D = PADDED(d);
    const float *at = t->z + element * m * d;
    float *z_t = TAKE(D * BLOCK), *product = TAKE(m * BLOCK), *most = TAKE(m);
    for (long j = 0; j < m; j++) most[j] = y->half_z[j] - 0.5f * NEAR * NEAR; /* z'p - |p|^2/2 of the distance NEAR */
    for (long b = 0; b < m; b += BLOCK) {
        const long count = LEAST(BLOCK, m - b);
        NAME(transpose)(count, D, (struct block){y->z + b * D, D}, z_t);
        NAME(product)(m - b, PADDED(count), d, y->z + b * D, D, 1, z_t, BLOCK, product, BLOCK, SETS);
        for (long j = b + 1; j < m; j++)
            for (long i = b; i < LEAST(j, b + count); i++) {
                const float close = product[(j - b) * BLOCK + i - b] - y->half_z[i];
                if (close > most[j]) most[j] = close, y->parent[j] = i;
            }
    }
    for (long j = 0; j < m; j++) {
        if (y->parent[j] < 0) continue;
        const float *z = y->z + j * D, *p = y->z + y->parent[j] * D;
        float *step = y->step + j * D, square = 0, fall = 0;
        for (long k = 0; k < d; k++) step[k] = (at[j * d + k] - at[y->parent[j] * d + k]) * t->scale;
        vec squares = {0}, falls = {0};
        for (long k = 0; k < D; k += LANES) {
            const vec along = *(vec *)(step + k);
            squares += along * along, falls += along * (*(const vec *)(z + k) + *(const vec *)(p + k));
        }
        for (int k = 0; k < LANES; k++) square += squares[k], fall += falls[k];
        y->fall[j] = -0.5f * fall;
        if (square <= 2 * NEAR * NEAR)
            *y->near = 1;
        else { /* The product of landmarks far from the origin may not tell. */
            y->parent[j] = -1;
            memcpy(step, z, sizeof(float) * D);
        }
    }
}

TARGET static void NAME(prepare)(const struct attention *t, long element, const struct NAME(landmarks) *y, float *room)
{
    const long m = t->m, d = t->d, D = PADDED(d);
    const float *centre = t->centre + element * d;
    *y->far = *y->near = 0;
    NAME(pad)(m, d, t->z + element * m * d, y->z);
    for (long j = 0; j < m; j++) {
        float *z = y->z + j * D, sum = 0;
        for (long k = 0; k < d; k++) z[k] = (z[k] - centre[k]) * t->scale, sum += z[k] * z[k];
        y->half_z[j] = 0.5f * sum;
        y->parent[j] = -1;
        *y->far |= !(y->half_z[j] < FAR);
    }
    memcpy(y->step, y->z, sizeof(float) * m * D);
    if (t->differs && !*y->far) NAME(parents)(t, element, y, room);
}

/* A row of C less that of a parent, which is times exp(x'step + fall) - 1; and the row itself. Of landmarks that are
   close, where A is near singular, it is their difference that counts, and what rounding leaves of this is small as the
   difference is. */
TARGET static void NAME(from_parent)(float *c, float *less, const float *parent, float fall, long width)
{
    const vec zero = {0}, low = zero + LOWEST, least = zero + FLOOR, one = zero + 1.0f;
    for (long r = 0; r < width; r += LANES) {
        vec y = *(vec *)(c + r) + fall;
        y = NAME(choose)(y > low, y, low), y = NAME(choose)(y < -low, y, -low);
        const vec p = *(const vec *)(parent + r), gap = NAME(expm1_of)(y) * p, k = p + gap;
        if (less) *(vec *)(less + r) = gap;
        *(vec *)(c + r) = NAME(choose)(k < one, (vec)((bits)k & (k >= least)), one);
    }
}

/* Rows of C, in rows of BLOCK, less those of their parents where they have any. */
TARGET static void NAME(differences)(const struct NAME(landmarks) *y, long m, const float *c, float *less, long width)
{
    for (long j = 0; j < m; j++)
        for (long r = 0; r < width; r++)
            less[j * BLOCK + r] = c[j * BLOCK + r] - (y->parent[j] < 0 ? 0 : c[y->parent[j] * BLOCK + r]);
}

/* Rows, of width numbers, with those of their parents. */
TARGET static void NAME(add_parents)(const struct NAME(landmarks) *y, long m, double *rows, long width)
{
    for (long j = 0; *y->near && j < m; j++)
        for (long r = 0; y->parent[j] >= 0 && r < width; r++) rows[j * width + r] += rows[y->parent[j] * width + r];
}

/* C transposed, (m, count), of points transposed, (d, count), in rows of BLOCK; and, if less is not 0 and some landmarks
   are near others, C less the rows of parents there. x'z, |x|^2 and |z|^2 are summed in the same order: where a point is
   next to a landmark their roundings are nearly the same, and go. next are the points that come next. */
TARGET static void NAME(gaussians)(const struct attention *t, int what, const struct NAME(landmarks) *y, const float *x,
                                   float *c, float *less, long count, struct place next)
{
    const long width = PADDED(count);
    float half_x[BLOCK];
    int careful = *y->far;
    for (long r = 0; r < width; r += LANES) {
        vec sum = {0};
        for (long k = 0; k < t->d; k++) sum += *(const vec *)(x + k * BLOCK + r) * *(const vec *)(x + k * BLOCK + r);
        *(vec *)(half_x + r) = sum * 0.5f;
    }
    for (long r = 0; r < width; r++) careful |= !(half_x[r] < FAR);
    const int near = *y->near && !careful;
    float *row = c;
    NAME(product)(t->m, width, t->d, near ? y->step : y->z, PADDED(t->d), 1, x, BLOCK, c, BLOCK, SETS);
    for (long j = 0; j < t->m; j++, row += BLOCK) {
        if (what != COTANGENTS) fetch(t, what, next, j, t->m);
        if (near && y->parent[j] >= 0)
            NAME(from_parent)(row, less ? less + j * BLOCK : 0, c + y->parent[j] * BLOCK, y->fall[j], width);
        else if (careful)
            for (long r = 0; r < width; r += LANES)
                *(vec *)(row + r) = NAME(exp)(*(vec *)(row + r) - (*(vec *)(half_x + r) + y->half_z[j]), 1);
        else
            for (long r = 0; r < width; r += LANES)
                *(vec *)(row + r) = NAME(exp)(*(vec *)(row + r) - (*(vec *)(half_x + r) + y->half_z[j]), 0);
        if (less && near && y->parent[j] < 0) memcpy(less + j * BLOCK, row, sizeof(float) * width);
    }
    if (less && *y->near && careful) NAME(differences)(y, t->m, c, less, width);
}

/* w = M b, and w + M(b - P w) as often as there are to be corrections, in padded rows, what is missing being computed in
   double precision, as _attend.py says. */
TARGET static void NAME(solve)(const struct attention *t, long element, const double *b, float *w, float *room)
{
    const long m = t->m, E = PADDED(t->e), along = t->transposed_core ? 1 : m;
    const float *core = t->core + element * m * m;
    const double *system = t->corrections ? t->system + element * m * m : 0;
    double *wide_w = (double *)TAKE(2 * m * E), *image = (double *)TAKE(2 * m * E);
    float *rest = TAKE(m * E);
    for (long k = 0; k < m * E; k++) rest[k] = b[k];
    NAME(product)(m, E, m, core, along, m + 1 - along, rest, E, w, E, SETS);
    for (long left = t->corrections; left > 0; left--) {
        NAME(widen)(m * E, w, wide_w);
        NAME(wide_product)(m, E, m, system, m, wide_w, E, image, E);
        for (long k = 0; k < m * E; k++) rest[k] = b[k] - image[k];
        NAME(product)(m, E, m, core, along, m + 1 - along, rest, E, w, E, ADDS);
    }
}

/* C'v in place of sums of differences, and w, both to memory too; or C'v in double precision to memory if that is asked
   for, and no w. */
TARGET static void NAME(solution)(const struct attention *t, long element, const struct NAME(landmarks) *y, float *sums,
                                  float *w, float *to, float *room)
{
    const long m = t->m, e = t->e, E = PADDED(e), first = element * m * e;
    double *wide_sums = (double *)TAKE(2 * m * E);
    NAME(widen)(m * E, sums, wide_sums);
    NAME(add_parents)(y, m, wide_sums, E);
    for (long k = 0; k < m * E; k++) sums[k] = wide_sums[k];
    NAME(unpad)(m, e, sums, t->sums + first);
    if (t->wide_sums)
        for (long j = 0; j < m; j++) memcpy(t->wide_sums + first + j * e, wide_sums + j * E, sizeof(double) * e);
    else {
        NAME(solve)(t, element, wide_sums, w, room);
        NAME(unpad)(m, e, w, to + first);
    }
}

/* The points from first to last of an element. With c_kept C is left there by SUMS, and found by others; what is summed
   are differences from parents. */
TARGET static void NAME(pass)(const struct attention *t, int what, long element, long first, long last,
                              const struct NAME(landmarks) *y, const float *w, const float *s, float *sums,
                              float *c_kept, float *room)
{
    const long m = t->m, d = t->d, e = t->e, D = PADDED(d), E = PADDED(e);
    float *x = TAKE(BLOCK * D), *x_t = TAKE(BLOCK * D), *v_room = TAKE(BLOCK * E), *g_room = TAKE(BLOCK * E);
    float *both_t = TAKE(2 * BLOCK * E), *out = TAKE(BLOCK * MOST(D, E)), *h = TAKE(BLOCK * m);
    float *of_block = TAKE(m * MOST(D, E)), *both = TAKE(2 * m * E);
    float *c = c_kept ? c_kept : TAKE(BLOCK * m);
    /* gw' + vs' is one product, of (g v) and (w s). */
    for (long j = 0; what == COTANGENTS && j < m; j++) {
        memcpy(both + 2 * j * e, w + j * E, sizeof(float) * e);
        memcpy(both + (2 * j + 1) * e, s + j * E, sizeof(float) * e);
    }
    for (long r = first; r < last; r += BLOCK, c += c_kept ? BLOCK * m : 0) {
        const struct place p = place_of(t, element, r, last), next = place_of(t, element, r + BLOCK, last);
        const int found = c_kept && what != SUMS;
        if (!found || what == COTANGENTS) NAME(points)(t, p, x);
        if (!found) {
            NAME(transpose)(p.count, D, (struct block){x, D}, x_t);
            NAME(gaussians)(t, what, y, x_t, c, what == SUMS ? h : 0, p.count, next);
        }
        if (what == SUMS) {
            const struct block v = NAME(gather)(&t->summed, p, e, v_room);
            NAME(product)(m, E, p.count, *y->near ? h : c, BLOCK, 1, v.at, v.stride, of_block, E, SETS);
            NAME(accumulate)(m * E, of_block, sums);
        } else if (what == PRODUCT)
            NAME(apply)(&t->out, p, e, m, c, w, SETS, out);
        else {
            float of_rows[BLOCK] = {0};
            NAME(apply)(&t->v_bar, p, e, m, c, s, way_of(&t->v_bar, t, e), out);
            NAME(transpose)(p.count, E, NAME(read)(&t->g, p, e, g_room), both_t);
            NAME(transpose)(p.count, E, NAME(read)(&t->v, p, e, v_room), both_t + e * BLOCK);
            NAME(product)(m, PADDED(p.count), 2 * e, both, 2 * e, 1, both_t, BLOCK, h, BLOCK, SETS);
            for (long j = 0; j < m; j++) {
                fetch(t, what, next, j, m);
                for (long i = j * BLOCK, r = 0; r < PADDED(p.count); i += LANES, r += LANES) {
                    const vec k = *(vec *)(h + i) * *(const vec *)(c + i);
                    *(vec *)(h + i) = k, *(vec *)(of_rows + r) += k;
                }
            }
            NAME(product)(m, D, p.count, h, BLOCK, 1, x, D, of_block, D, SETS);
            NAME(accumulate)(m * D, of_block, sums);
            NAME(product)(p.count, D, m, h, 1, BLOCK, y->z, D, out, D, SETS);
            NAME(less_points)(t, p, of_rows, x, out);
        }
    }
}

/* z_bar = s(H'x - diag(H'1)z) to memory, for H'x in padded rows; and of_gram with what z has in P, whose cotangent is
   -sigma_bar w': s(Gz - diag(G1)z), G = -P(sigma_bar w' + w sigma_bar') entry by entry, but 0 on its diagonal. */
TARGET static void NAME(landmark_cotangents)(const struct attention *t, long element, const struct NAME(landmarks) *y,
                                             const float *w_bar, const float *w, const float *s, float *z_bar,
                                             float *room)
{
    const long m = t->m, d = t->d, e = t->e, D = PADDED(d), E = PADDED(e), S = PADDED(m);
    const float *sigma = t->sigma + element * m * e;
    float *w_t = TAKE(E * S), *s_t = TAKE(E * S), *g = TAKE(m * S), *sums = TAKE(S);
    for (long j = 0; j < m; j++) {
        sums[j] = 0;
        for (long k = 0; k < e; k++) sums[j] += w_bar[j * E + k] * w[j * E + k] + sigma[j * e + k] * s[j * E + k];
    }
    if (t->of_gram) {
        const double *system = t->system + element * m * m;
        for (long k = 0; k < e; k++)
            for (long j = 0; j < S; j++) {
                w_t[k * S + j] = j < m ? w[j * E + k] : 0;
                s_t[k * S + j] = j < m ? s[j * E + k] : 0;
            }
        NAME(product)(m, S, e, s, E, 1, w_t, S, g, S, SETS);
        NAME(product)(m, S, e, w, E, 1, s_t, S, g, S, ADDS);
        for (long i = 0; i < m; i++) {
            g[i * S + i] = 0;
            for (long j = 0; j < m; j++) sums[i] += g[i * S + j] *= -(float)system[i * m + j];
        }
        NAME(product)(m, D, m, g, S, 1, y->z, D, z_bar, D, ADDS);
    }
    for (long j = 0; j < m; j++)
        for (long k = 0; k < d; k++) z_bar[j * D + k] = t->scale * (z_bar[j * D + k] - sums[j] * y->z[j * D + k]);
    NAME(unpad)(m, d, z_bar, t->z_bar + element * m * d);
}

/* One item: all of an element, or a chunk of its points. */
TARGET static void NAME(attend)(const void *task, int what, long item, float *room)
{
    const struct attention *t = task;
    const long m = t->m, d = t->d, e = t->e, D = PADDED(d), E = PADDED(e), W = MOST(D, E);
    const int whole = is_whole(what);
    const long chunks = chunks_of(t, what), element = item / chunks;
    const long first = item % chunks * CHUNK, last = whole ? t->n : LEAST(first + CHUNK, t->n);
    float *at = whole ? TAKE(of_landmarks(t)) : t->landmarks + element * of_landmarks(t);
    const struct NAME(landmarks) y = NAME(landmarks_at)(t, at);
    float *w = TAKE(m * E), *s = TAKE(m * E), *sums = TAKE(m * W), *w_bar = TAKE(m * E);
    float *c = whole ? TAKE((t->n + BLOCK - 1) / BLOCK * BLOCK * m) : 0;
    if (whole || what == LANDMARKS) NAME(prepare)(t, element, &y, room);
    if (what == LANDMARKS) return;
    if (what == PRODUCT || what == COTANGENTS || what == BACKWARD) NAME(pad)(m, e, t->w + element * m * e, w);
    if (what == COTANGENTS) NAME(pad)(m, e, t->sigma_bar + element * m * e, s);
    memset(sums, 0, sizeof(float) * m * W);
    if (what == SOLUTION) {
        NAME(pad)(m, e, t->sums + element * m * e, sums);
        NAME(solution)(t, element, &y, sums, w, t->w, room);
        return;
    }
    if (whole) {
        NAME(pass)(t, SUMS, element, first, last, &y, 0, 0, sums, c, room);
        NAME(solution)(t, element, &y, sums, what == FORWARD ? w : s, what == FORWARD ? t->w : t->sigma_bar, room);
        memcpy(w_bar, sums, sizeof(float) * m * E);
        memset(sums, 0, sizeof(float) * m * W);
        what = what == FORWARD ? PRODUCT : COTANGENTS;
    }
    NAME(pass)(t, what, element, first, last, &y, w, s, sums, c, room);
    if (what == SUMS) NAME(unpad)(m, e, sums, t->sums + item * m * e);
    if (whole && what == COTANGENTS)
        NAME(landmark_cotangents)(t, element, &y, w_bar, w, s, sums, room);
    else if (what == COTANGENTS)
        NAME(unpad)(m, d, sums, t->from_q + item * m * d);
}
