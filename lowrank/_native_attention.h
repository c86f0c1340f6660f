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
    const float scale = t->scale;
    const int direct = !out->half, streams = way_of(out, t, d) == STREAMS;
    for (long i = 0; i < p.count; i++, x += stride, hz += stride) {
        float *to = direct ? at + i * out->of_row : hz;
        if (streams)
            for (long k = 0; k < d; k += LANES)
                NAME(stream)(to + k, scale * (*(vec *)(hz + k) - of_rows[i] * *(const vec *)(x + k)));
        else
            for (long k = 0; k < d; k++) to[k] = scale * (hz[k] - of_rows[i] * x[k]);
    }
    if (!direct) NAME(write)(out, p, d, hz - p.count * stride);
}

/* Landmarks z = (landmark - c)s of an element, in padded rows, and |z|^2/2; whether one is so far out that care is
   needed. */
struct NAME(landmarks) {
    float *z, *half_z;
    int far;
};

TARGET static struct NAME(landmarks) NAME(prepared)(const struct attention *t, long element, float *room)
{
    const long m = t->m, d = t->d, D = PADDED(d);
    const float *centre = t->centre + element * d, scale = t->scale;
    float *all = TAKE(m * D), *half = TAKE(m);
    struct NAME(landmarks) y = {all, half, 0};
    NAME(pad)(m, d, t->z + element * m * d, y.z);
    for (long j = 0; j < m; j++) {
        float *z = y.z + j * D, sum = 0;
        for (long k = 0; k < d; k++) z[k] = (z[k] - centre[k]) * scale, sum += z[k] * z[k];
        y.half_z[j] = 0.5f * sum;
        y.far |= !(y.half_z[j] < FAR);
    }
    return y;
}

/* C transposed, (m, count), of points transposed, (d, count), in rows of BLOCK. x'z, |x|^2 and |z|^2 are summed in the
   same order: where a point is next to a landmark their roundings are nearly the same, and go. next are the points that
   come next. */
TARGET static void NAME(gaussians)(const struct attention *t, int what, const struct NAME(landmarks) *y, const float *x,
                                   float *c, long count, struct place next)
{
    const long width = PADDED(count);
    float half_x[BLOCK];
    int careful = y->far;
    for (long r = 0; r < width; r += LANES) {
        vec sum = {0};
        for (long k = 0; k < t->d; k++) sum += *(const vec *)(x + k * BLOCK + r) * *(const vec *)(x + k * BLOCK + r);
        *(vec *)(half_x + r) = sum * 0.5f;
    }
    for (long r = 0; r < width; r++) careful |= !(half_x[r] < FAR);
    NAME(product)(t->m, width, t->d, y->z, PADDED(t->d), 1, x, BLOCK, c, BLOCK, SETS);
    for (long j = 0; j < t->m; j++, c += BLOCK) {
        if (what != COTANGENTS) fetch(t, what, next, j, t->m);
        if (careful)
            for (long r = 0; r < width; r += LANES)
                *(vec *)(c + r) = NAME(exp)(*(vec *)(c + r) - (*(vec *)(half_x + r) + y->half_z[j]), 1);
        else
            for (long r = 0; r < width; r += LANES)
                *(vec *)(c + r) = NAME(exp)(*(vec *)(c + r) - (*(vec *)(half_x + r) + y->half_z[j]), 0);
    }
}

/* For the points from first to last of an element, with C and all else in double precision: C'v in sums (m, PADDED(e)), or,
   if w is not 0, H'x in sums (m, PADDED(d)) and H'1 in columns. */
TARGET static void NAME(wide_pass)(const struct attention *t, long element, long first, long last, const float *w,
                                   const float *s, double *sums, double *columns, float *room)
{
    const long m = t->m, d = t->d, e = t->e, D = PADDED(d), E = PADDED(e), W = MOST(D, E), wide_e = w ? 2 * e : 0;
    const float *at = t->z + element * m * d, *centre = t->centre + element * d;
    float *q_room = TAKE(BLOCK * D), *v_room = TAKE(BLOCK * E), *g_room = TAKE(BLOCK * E);
    float *transposed = TAKE(BLOCK * MOST(D, 2 * E));
    double *z = (double *)TAKE(2 * m * D), *half_z = (double *)TAKE(2 * m), *half_x = (double *)TAKE(2 * BLOCK);
    double *x = (double *)TAKE(2 * BLOCK * D), *x_t = (double *)TAKE(2 * BLOCK * D), *c = (double *)TAKE(2 * BLOCK * m);
    double *v = (double *)TAKE(4 * BLOCK * E), *both = (double *)TAKE(4 * m * E), *h = (double *)TAKE(2 * BLOCK * m);
    double *of_block = (double *)TAKE(2 * m * W);
    for (long j = 0; j < m; j++) {
        half_z[j] = 0;
        for (long k = 0; k < d; k++) {
            z[j * D + k] = ((double)at[j * d + k] - centre[k]) * t->scale;
            half_z[j] += 0.5 * z[j * D + k] * z[j * D + k];
        }
        for (long k = 0; k < wide_e; k++) both[j * wide_e + k] = k < e ? w[j * E + k] : s[j * E + k - e];
    }
    memset(sums, 0, sizeof(double) * m * (w ? D : E));
    for (long j = 0; w && j < m; j++) columns[j] = 0;
    for (long r = first; r < last; r += BLOCK) {
        const struct place p = place_of(t, element, r, last);
        const long width = PADDED(p.count);
        const struct block q = NAME(read)(&t->q, p, d, q_room), of_v = NAME(read)(w ? &t->v : &t->summed, p, e, v_room);
        const struct block of_g = w ? NAME(read)(&t->g, p, e, g_room) : of_v;
        for (long i = 0; w && i < p.count; i++) NAME(widen)(D, q.at + i * q.stride, x + i * D);
        for (long i = 0; w && i < p.count; i++)
            for (long k = 0; k < D; k++) x[i * D + k] = k < d ? (x[i * D + k] - centre[k]) * t->scale : 0;
        NAME(transpose)(p.count, D, q, transposed);
        for (long i = 0; i < width; i++) half_x[i] = 0;
        for (long k = 0; k < d; k++) {
            double *row = x_t + k * BLOCK;
            NAME(widen)(width, transposed + k * BLOCK, row);
            for (long i = 0; i < width; i++) row[i] = (row[i] - centre[k]) * t->scale;
            for (long i = 0; i < width; i++) half_x[i] += 0.5 * row[i] * row[i];
        }
        NAME(wide_product)(m, width, d, z, D, x_t, BLOCK, c, BLOCK);
        for (long j = 0; j < m; j++)
            for (long i = j * BLOCK, k = 0; k < width; i += LANES / 2, k += LANES / 2) {
                const wide y = *(wide *)(c + i) - (*(wide *)(half_x + k) + half_z[j]);
                *(wide *)(c + i) = NAME(wide_exp)((wide)((wide_bits)y & ~(y > (wide){0})));
            }
        if (!w) {
            for (long i = 0; i < p.count; i++) NAME(widen)(E, of_v.at + i * of_v.stride, v + i * E);
            NAME(wide_product)(m, E, p.count, c, BLOCK, v, E, of_block, E);
            for (long k = 0; k < m * E; k++) sums[k] += of_block[k];
            continue;
        }
        /* gw' + vs' is one product, of (g v) and (w s). */
        NAME(transpose)(p.count, E, of_g, transposed);
        NAME(transpose)(p.count, E, of_v, transposed + e * BLOCK);
        for (long k = 0; k < wide_e; k++) NAME(widen)(width, transposed + k * BLOCK, v + k * BLOCK);
        NAME(wide_product)(m, width, wide_e, both, wide_e, v, BLOCK, h, BLOCK);
        for (long j = 0; j < m; j++) {
            wide sum = {0};
            for (long i = j * BLOCK; i < j * BLOCK + width; i += LANES / 2)
                *(wide *)(h + i) *= *(wide *)(c + i), sum += *(wide *)(h + i);
            for (int i = 0; i < LANES / 2; i++) columns[j] += sum[i];
        }
        NAME(wide_product)(m, D, p.count, h, BLOCK, x, D, of_block, D);
        for (long k = 0; k < m * D; k++) sums[k] += of_block[k];
    }
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

/* Whether rounding of sigma, of each row for itself by some eps, which are more for landmarks far from their centre, counts
   in w = M sigma for more than so many as it may. */
TARGET static int NAME(amplifies)(const struct attention *t, long element, const struct NAME(landmarks) *y,
                                  const double *sigma, const float *w, float *room)
{
    const long m = t->m, E = PADDED(t->e);
    const float *core = t->core + element * m * m;
    double *rounded = (double *)TAKE(2 * m), of_error = 0, of_w = 0;
    for (long j = 0; j < m; j++) {
        double square = 0;
        for (long k = j * E; k < (j + 1) * E; k++) square += sigma[k] * sigma[k], of_w += (double)w[k] * w[k];
        rounded[j] = square * (1 + y->half_z[j] / REACH) * (1 + y->half_z[j] / REACH);
    }
    for (long i = 0; i < m; i++)
        for (long j = 0; j < m; j++) of_error += (double)core[i * m + j] * core[i * m + j] * rounded[j];
    return of_error > (double)t->most * t->most * of_w;
}

/* C'v, as it is in double precision, and w, to memory and in padded rows; and whether the one has to be right to more than
   rounding. */
TARGET static int NAME(solution)(const struct attention *t, long element, const struct NAME(landmarks) *y,
                                 const double *sigma, float *w, float *to, float *room)
{
    const long m = t->m, e = t->e, E = PADDED(e), first = element * m * e;
    float *sums = TAKE(m * E);
    for (long k = 0; k < m * E; k++) sums[k] = sigma[k];
    NAME(solve)(t, element, sigma, w, room);
    NAME(unpad)(m, e, sums, t->sums + first);
    NAME(unpad)(m, e, w, to + first);
    return t->most && NAME(amplifies)(t, element, y, sigma, w, room);
}

/* What points close to the landmark j bring to H(z - x), to less, a row for each point, and H'(x - z), to sums: of these
   the differences are exact, and where the point is the landmark, and others are far, they are all there is but for
   rounding of Hz and H1. What remains of h, a row of H', is that of the others. Whether there are any. */
TARGET static int NAME(take_close)(const struct attention *t, struct place p, long j, const float *c, float *h,
                                   float *less, double *sums, int any, float *room)
{
    const long d = t->d, D = PADDED(d);
    const float *z = t->z + (p.element * t->m + j) * d, scale = t->scale;
    const struct block q = NAME(read)(&t->q, p, d, room);
    for (long r = 0; r < p.count; r++) {
        if (!(c[r] > CLOSE)) continue;
        if (!any++) memset(less, 0, sizeof(float) * BLOCK * D);
        for (long k = 0; k < d; k++) {
            const float gap = h[r] * ((q.at[r * q.stride + k] - z[k]) * scale);
            less[r * D + k] += gap, sums[k] += gap;
        }
        h[r] = 0;
    }
    return any;
}

/* The points from first to last of an element. With c_kept C is left there by SUMS, and found by others. Cotangents leave
   H'x, and H'1 in columns, less what is close: that has H'(x - z) in H'x. */
TARGET static void NAME(pass)(const struct attention *t, int what, long element, long first, long last,
                              const struct NAME(landmarks) *y, const float *w, const float *s, double *sums,
                              double *columns, float *c_kept, float *room)
{
    const long m = t->m, d = t->d, e = t->e, D = PADDED(d), E = PADDED(e);
    float *x = TAKE(BLOCK * D), *x_t = TAKE(BLOCK * D), *v_room = TAKE(BLOCK * E), *g_room = TAKE(BLOCK * E);
    float *both_t = TAKE(2 * BLOCK * E), *out = TAKE(BLOCK * MOST(D, E)), *h = TAKE(BLOCK * m);
    float *of_block = TAKE(m * MOST(D, E)), *both = TAKE(2 * m * E), *close = TAKE(BLOCK * D);
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
            NAME(gaussians)(t, what, y, x_t, c, p.count, next);
        }
        if (what == SUMS) {
            const struct block v = NAME(gather)(&t->summed, p, e, v_room);
            for (long k = 0; k < p.count; k += FEW)
                NAME(product)(m, E, LEAST(FEW, p.count - k), c + k, BLOCK, 1, v.at + k * v.stride, v.stride, of_block,
                              E, k ? ADDS : SETS);
            NAME(accumulate)(m * E, of_block, sums);
        } else if (what == PRODUCT)
            NAME(apply)(&t->out, p, e, m, c, w, SETS, out);
        else {
            float of_rows[BLOCK] = {0};
            int any = 0;
            NAME(apply)(&t->v_bar, p, e, m, c, s, way_of(&t->v_bar, t, e), out);
            NAME(transpose)(p.count, E, NAME(read)(&t->g, p, e, g_room), both_t);
            NAME(transpose)(p.count, E, NAME(read)(&t->v, p, e, v_room), both_t + e * BLOCK);
            NAME(product)(m, PADDED(p.count), 2 * e, both, 2 * e, 1, both_t, BLOCK, h, BLOCK, SETS);
            for (long j = 0; j < m; j++) {
                float *c_row = c + j * BLOCK, *h_row = h + j * BLOCK, largest = 0;
                vec most = {0}, sum = {0};
                fetch(t, what, next, j, m);
                for (long r = 0; r < PADDED(p.count); r += LANES) {
                    const vec k = *(vec *)(c_row + r);
                    *(vec *)(h_row + r) *= k, most = NAME(choose)(k > most, k, most);
                }
                for (int i = 0; i < LANES; i++) largest = MOST(largest, most[i]);
                if (largest > CLOSE) any = NAME(take_close)(t, p, j, c_row, h_row, close, sums + j * D, any, room);
                for (long r = 0; r < PADDED(p.count); r += LANES) {
                    *(vec *)(of_rows + r) += *(vec *)(h_row + r);
                    sum += *(vec *)(h_row + r);
                }
                for (int i = 0; i < LANES; i++) columns[j] += sum[i];
            }
            NAME(product)(m, D, p.count, h, BLOCK, 1, x, D, of_block, D, SETS);
            NAME(accumulate)(m * D, of_block, sums);
            NAME(product)(p.count, D, m, h, 1, BLOCK, y->z, D, out, D, SETS);
            for (long k = 0; any && k < p.count * D; k++) out[k] -= close[k];
            NAME(less_points)(t, p, of_rows, x, out);
        }
    }
}

/* z_bar = s(H'x - diag(H'1)z) to memory, for H'x in padded rows and H'1 in columns; and of_gram with what z has in P, whose
   cotangent is -sigma_bar w': s(Gz - diag(G1)z), G = -P(sigma_bar w' + w sigma_bar') entry by entry, but 0 on its diagonal.
   Little may be left of the two, and so all is in double precision. */
TARGET static void NAME(landmark_cotangents)(const struct attention *t, long element, const float *w, const float *s,
                                             double *z_bar, double *columns, float *room)
{
    const long m = t->m, d = t->d, e = t->e, D = PADDED(d), E = PADDED(e), S = PADDED(m);
    const float *at = t->z + element * m * d, *centre = t->centre + element * d;
    double *both = (double *)TAKE(4 * m * E), *both_t = (double *)TAKE(4 * E * S), *g = (double *)TAKE(2 * m * S);
    double *z = (double *)TAKE(2 * m * D), *of_gram = (double *)TAKE(2 * m * D);
    memset(z, 0, sizeof(double) * m * D);
    for (long j = 0; j < m; j++)
        for (long k = 0; k < d; k++) z[j * D + k] = ((double)at[j * d + k] - centre[k]) * t->scale;
    if (t->of_gram) {
        const double *system = t->system + element * m * m;
        for (long j = 0; j < S; j++)
            for (long k = 0; k < e; k++) {
                both_t[k * S + j] = j < m ? w[j * E + k] : 0, both_t[(e + k) * S + j] = j < m ? s[j * E + k] : 0;
                if (j < m) both[j * 2 * e + k] = s[j * E + k], both[j * 2 * e + e + k] = w[j * E + k];
            }
        NAME(wide_product)(m, S, 2 * e, both, 2 * e, both_t, S, g, S);
        for (long i = 0; i < m; i++) {
            g[i * S + i] = 0;
            for (long j = 0; j < m; j++) columns[i] += g[i * S + j] *= -system[i * m + j];
        }
        NAME(wide_product)(m, D, m, g, S, z, D, of_gram, D);
        for (long k = 0; k < m * D; k++) z_bar[k] += of_gram[k];
    }
    for (long j = 0; j < m; j++)
        for (long k = 0; k < d; k++)
            t->z_bar[(element * m + j) * d + k] = t->scale * (z_bar[j * D + k] - columns[j] * z[j * D + k]);
}

/* w for sums over all chunks of an element, and whether it needs them in double precision; or for such, if it does. */
TARGET static void NAME(one_solution)(const struct attention *t, long element, float *room)
{
    const long m = t->m, e = t->e, E = PADDED(e), first = element * m * e;
    double *sigma = (double *)TAKE(2 * m * E);
    float *w = TAKE(m * E), *sums = TAKE(m * E);
    if (t->wide_sums && !t->amplified[element]) return;
    const struct NAME(landmarks) y = NAME(prepared)(t, element, room);
    room += of_landmarks(t);
    NAME(pad)(m, e, t->sums + first, sums);
    NAME(widen)(m * E, sums, sigma);
    for (long j = 0; t->wide_sums && j < m; j++) memcpy(sigma + j * E, t->wide_sums + first + j * e, sizeof(double) * e);
    const int amplified = NAME(solution)(t, element, &y, sigma, w, t->w, room);
    if (!t->wide_sums) t->amplified[element] = amplified;
}

/* One item: all of an element, or a chunk of its points. */
TARGET static void NAME(attend)(const void *task, int what, long item, float *room)
{
    const struct attention *t = task;
    const long m = t->m, d = t->d, e = t->e, D = PADDED(d), E = PADDED(e), W = MOST(D, E);
    const int whole = is_whole(what);
    const long chunks = chunks_of(t, what), element = item / chunks;
    const long first = item % chunks * CHUNK, last = whole ? t->n : LEAST(first + CHUNK, t->n);
    if (what == SOLUTION) {
        NAME(one_solution)(t, element, room);
        return;
    }
    double *sums = (double *)TAKE(2 * m * W), *columns = (double *)TAKE(2 * m);
    float *rounded = TAKE(m * W);
    if (what == WIDE_SUMS) {
        if (!t->amplified[element]) return;
        NAME(wide_pass)(t, element, first, last, 0, 0, sums, 0, room);
        for (long j = 0; j < m; j++) memcpy(t->wide_sums + (item * m + j) * e, sums + j * E, sizeof(double) * e);
        return;
    }
    float *w = TAKE(m * E), *s = TAKE(m * E);
    float *c = whole ? TAKE((t->n + BLOCK - 1) / BLOCK * BLOCK * m) : 0;
    const struct NAME(landmarks) y = NAME(prepared)(t, element, room);
    room += of_landmarks(t);
    int amplified = what == COTANGENTS && t->amplified && t->amplified[element];
    if (what == PRODUCT || what == COTANGENTS || what == BACKWARD) NAME(pad)(m, e, t->w + element * m * e, w);
    if (what == COTANGENTS) NAME(pad)(m, e, t->sigma_bar + element * m * e, s);
    memset(sums, 0, sizeof(double) * m * W);
    memset(columns, 0, sizeof(double) * m);
    if (whole) {
        float *found = what == FORWARD ? w : s, *to = what == FORWARD ? t->w : t->sigma_bar;
        NAME(pass)(t, SUMS, element, first, last, &y, 0, 0, sums, 0, c, room);
        amplified = NAME(solution)(t, element, &y, sums, found, to, room);
        if (amplified) {
            NAME(wide_pass)(t, element, first, last, 0, 0, sums, 0, room);
            NAME(solution)(t, element, &y, sums, found, to, room);
        }
        memset(sums, 0, sizeof(double) * m * W);
        what = what == FORWARD ? PRODUCT : COTANGENTS;
    }
    NAME(pass)(t, what, element, first, last, &y, w, s, sums, columns, c, room);
    if (what == SUMS) {
        for (long k = 0; k < m * E; k++) rounded[k] = sums[k];
        NAME(unpad)(m, e, rounded, t->sums + item * m * e);
    }
    if (what != COTANGENTS) return;
    if (amplified) NAME(wide_pass)(t, element, first, last, w, s, sums, columns, room);
    if (whole)
        NAME(landmark_cotangents)(t, element, w, s, sums, columns, room);
    else
        for (long j = 0; j < m; j++) {
            double *to = t->from_q + (item * m + j) * (d + 1);
            memcpy(to, sums + j * D, sizeof(double) * d);
            to[d] = columns[j];
        }
}
