// The gradient of a factor's entries: dw[i, k, l, j] = sum over samples of g[n, (i, k, j)] * x[n, (i, l, j)].
// Lanes are inputs (l, j), rows of a tile outputs k. Batch first reads x and g where they lie, or copies a chunk of the
// batch where rows would meet in one set of the first cache or come from memory; batch last turns a chunk of x.
namespace {

constexpr i64 L2 = 131072;  // floats of the second cache that a chunk may take (512 KiB)

// What a call needs, for each thread: the chunk, rows of it, and sums that are not yet in the order of the entries.
struct Plan { i64 chunk, turned, sums; };

// Some super-blocks share a vector: the entries of k in the order of the inputs, eight rows at a time.
inline bool is_small(const Factor& f) { return PERMUTES && f.a > 1 && f.b <= 8 && most(f.b, f.c) * f.d <= W; }

template <int B> void small_rows(const Gradient& c, float* sums, i64 from, i64 to) {
  const Factor& f = c.factor;
  const i64 blocks = tiny_blocks(f), in = f.c * f.d, out = f.b * f.d;
  index idx[B];
  for (int k = 0; k < B; k++) {
    int lanes[W];
    for (i64 e = 0; e < W; e++) lanes[e] = e / in < blocks ? (int)(e / in * out + k * f.d + e % f.d) : 0;
    idx[k] = indices(lanes);
  }
  for (i64 n = 0; n < c.batch; n += 8) {
    const i64 height = least(8, c.batch - n);
    float* s = sums + from * B * W;
    for (i64 t = from; t < to; t++, s += B * W) {
      const i64 here = least(blocks, f.a - t * blocks);
      const mask right = first_lanes(here * in), left = first_lanes(here * out);
      const float* p = c.x + n * c.x_stride + t * blocks * in;
      const float* q = c.g + n * c.g_stride + t * blocks * out;
      vec acc[B];
#pragma GCC unroll 8
      for (int k = 0; k < B; k++) acc[k] = n ? load(s + k * W) : zero();
      for (i64 r = 0; r < height; r++) {
        __builtin_prefetch(p + r * c.x_stride + 4 * W);
        __builtin_prefetch(q + r * c.g_stride + 4 * W);
        const vec x = load(p + r * c.x_stride, right), g = load(q + r * c.g_stride, left);
#pragma GCC unroll 8
        for (int k = 0; k < B; k++) acc[k] = fma(permute(g, idx[k]), x, acc[k]);
      }
#pragma GCC unroll 8
      for (int k = 0; k < B; k++) store(s + k * W, acc[k]);
    }
  }
  for (i64 t = from; t < to; t++)
    for (i64 k = 0; k < B; k++)
      for (i64 e = 0; e < least(blocks, f.a - t * blocks) * in; e++)
        c.w[((t * blocks + e / in) * B + k) * in + e % in] = sums[(t * B + k) * W + e];
}

void small_first(const Gradient& c, float* sums, i64 from, i64 to) {
  switch (c.factor.b) {
    case 1: return small_rows<1>(c, sums, from, to);
    case 2: return small_rows<2>(c, sums, from, to);
    case 3: return small_rows<3>(c, sums, from, to);
    case 4: return small_rows<4>(c, sums, from, to);
    case 5: return small_rows<5>(c, sums, from, to);
    case 6: return small_rows<6>(c, sums, from, to);
    case 7: return small_rows<7>(c, sums, from, to);
    default: return small_rows<8>(c, sums, from, to);
  }
}

// Rows of x, block by block of a row: block i goes to out + i * n * stride.
void copy_blocks(const float* x, i64 x_stride, float* out, i64 stride, i64 n, i64 blocks, i64 width) {
  for (i64 r = 0; r < n; r++)
    for (i64 i = 0; i < blocks; i++) {
      const float* p = x + r * x_stride + i * width;
      float* o = out + (i * n + r) * stride;
      i64 e = 0;
      for (; e + W <= width; e += W) store(o + e, load(p + e));
      if (e < width) store(o + e, load(p + e, first_lanes(width - e)), first_lanes(width - e));
    }
}

// A stride in which rows do not meet in the first cache.
inline i64 apart(i64 width) { return ceil_div(width, 16) * 16 + 16; }

// Tasks from <= t < to: part t % parts of the panels of super-block t / parts, for the whole batch. Where memory is far,
// every k reads a copy of x that stays in the first cache, and the next chunk's rows travel meanwhile: those of x during
// the first half of the jobs, those of g during the second.
void range_first(const Gradient& c, i64 chunk, float* copy, i64 from, i64 to, i64 parts) {
  const Factor& f = c.factor;
  const i64 in = f.c * f.d, out = f.b * f.d, total = ceil_div(in, W), period = period_of(f.d);
  const i64 first = from / parts, blocks = ceil_div(to, parts) - first, xs = copy ? apart(in) : c.x_stride;
  i64 jobs = 0;
  panels(total, f.d, [&](const Phase&, i64, i64) { jobs++; });
  const i64 half = most(1, jobs * (to - from) / parts / 2);
  for (i64 n = 0; n < c.batch; n += chunk) {
    const i64 count = least(chunk, c.batch - n), ahead = copy ? least(chunk, c.batch - n - count) : 0;
    if (copy) copy_blocks(c.x + n * c.x_stride + first * in, c.x_stride, copy, xs, count, blocks, in);
    i64 done = 0;
    for (i64 task = from; task < to; task++) {
      const i64 i = task / parts;
      const float* p = c.g + n * c.g_stride + i * out;
      const float* w = copy ? copy + (i - first) * count * xs : c.x + n * c.x_stride + i * in;
      float* y = c.w + i * f.b * in;
      i64 number = 0;
      panels(total, f.d, [&](const Phase& h, i64 t, i64 columns) {
        if (number++ % parts != task % parts) return;
        const bool ends = t + (columns - 1) * period == total - 1, right = done < half;
        Job job = {p + h.offset, f.d, c.g_stride, &h, w + t * W, xs, period * W, count, y + t * W, in, period * W,
                   f.b, ends ? lanes_of(in) : W, n > 0, false, false, false, nullptr, 0, 0, 0};
        const i64 at = done % half;
        if (ahead && done < 2 * half) {
          const i64 row = at * ahead / half;
          job.next_stride = right ? c.x_stride : c.g_stride;
          job.next = (right ? c.x + first * in : c.g + first * out) + (n + count + row) * job.next_stride;
          job.next_rows = (at + 1) * ahead / half - row;
          job.next_lines = ceil_div(blocks * (right ? in : out), 16);
        }
        done++;
        run(job, (int)columns);
      });
    }
  }
}

template <int R, int C> INLINE void dots(const float* p, i64 ps, const float* q, i64 qs, i64 n, float* o, i64 os, i64 oc,
                                         bool accumulate) {
  static_assert(C == 4 || C == 1, "four sums at once");
  vec acc[R][4];
  for (int r = 0; r < R; r++) for (int e = 0; e < 4; e++) acc[r][e] = zero();
  i64 s = 0;
  for (; s + W <= n; s += W) {
    vec right[C];
#pragma GCC unroll 4
    for (int e = 0; e < C; e++) right[e] = load(q + e * qs + s);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      vec left = load(p + r * ps + s);
#pragma GCC unroll 4
      for (int e = 0; e < C; e++) acc[r][e] = fma(left, right[e], acc[r][e]);
    }
  }
  if (s < n) {
    const mask m = first_lanes(n - s);
    for (int r = 0; r < R; r++) {
      vec left = load(p + r * ps + s, m);
      for (int e = 0; e < C; e++) acc[r][e] = fma(left, load(q + e * qs + s, m), acc[r][e]);
    }
  }
  for (int r = 0; r < R; r++) {
    float four[4];
    sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3], four);
    for (int e = 0; e < C; e++) o[r * os + e * oc] = accumulate ? o[r * os + e * oc] + four[e] : four[e];
  }
}

constexpr int HEIGHT = W == 16 ? 5 : 2;

// Batch last with few inputs a group: dot products along the samples.
void narrow_group(const Gradient& c, i64 i, i64 j) {
  const Factor& f = c.factor;
  const i64 gs = f.d * c.g_stride, xs = f.d * c.x_stride, os = f.c * f.d;
  const i64 chunk = most(256, CACHE / 2 / (f.b + f.c) / W * W);
  for (i64 n = 0; n < c.batch; n += chunk) {
    const i64 count = least(chunk, c.batch - n);
    const float* g = c.g + (i * f.b * f.d + j) * c.g_stride + n;
    const float* x = c.x + (i * f.c * f.d + j) * c.x_stride + n;
    float* o = c.w + i * f.b * os + j;
    for (i64 l = 0; l < f.c;) {
      const bool four = l + 4 <= f.c;
      for (i64 k = 0; k < f.b;) {
        float* to = o + k * os + l * f.d;
        if (four && k + HEIGHT <= f.b) {
          dots<HEIGHT, 4>(g + k * gs, gs, x + l * xs, xs, count, to, os, f.d, n > 0);
          k += HEIGHT;
        } else {
          if (four) dots<1, 4>(g + k * gs, gs, x + l * xs, xs, count, to, os, f.d, n > 0);
          else dots<1, 1>(g + k * gs, gs, x + l * xs, xs, count, to, os, f.d, n > 0);
          k++;
        }
      }
      l += four ? 4 : 1;
    }
  }
}

// The inputs of one group for `count` samples, turned: panels of columns, then samples, then lanes; padded with zeros.
void turn(const float* x, i64 xs, i64 inputs, i64 count, float* out) {
  const i64 whole = count / W * W;
  panels(ceil_div(inputs, W), 1, [&](const Phase&, i64 t, i64 columns) {
    for (i64 v = 0; v < columns; v++) {
      const i64 l = (t + v) * W, here = least(W, inputs - l);
      const float* p = x + l * xs;
      float* o = out + v * W;
      if (here == W)
        for (i64 s = 0; s < whole; s += W) transpose<1>(p + s, xs, o + s * columns * W, columns * W);
      for (i64 s = here == W ? whole : 0; s < count; s++)
        for (i64 e = 0; e < W; e++) o[s * columns * W + e] = e < here ? p[e * xs + s] : 0.0f;
    }
    out += columns * count * W;
  });
}

// out[l * d + j] = in[j * step + l] for j < count.
void interleave(const float* in, i64 step, i64 count, i64 inputs, float* out, i64 d) {
  i64 l = 0;
  if (count == W)
    for (; l + W <= inputs; l += W) transpose<1>(in + l, step, out + l * d, d);
  if (count == 2)
    for (; l < inputs; l++) { out[l * d] = in[l]; out[l * d + 1] = in[step + l]; }
  for (; l < inputs; l++)
    for (i64 j = 0; j < count; j++) out[l * d + j] = in[j * step + l];
}

// Groups (i, j) to (i, j + count), batch last: a chunk of x is turned, so that lanes are inputs.
void groups_last(const Gradient& c, const Plan& plan, i64 i, i64 j, i64 count, float* scratch) {
  const Factor& f = c.factor;
  const i64 gs = f.d * c.g_stride, xs = f.d * c.x_stride, total = ceil_div(f.c, W), width = total * W;
  const bool direct = f.d == 1;
  float* sums = scratch + plan.turned;
  const i64 step = f.b * width, ys = direct ? f.c : width;
  const Phase h = phase_of(1, 0);
  for (i64 e = 0; e < count; e++) {
    float* y = direct ? c.w + i * f.b * f.c : sums + e * step;
    for (i64 n = 0; n < c.batch; n += plan.chunk) {
      const i64 samples = least(plan.chunk, c.batch - n);
      const float* g = c.g + (i * f.b * f.d + j + e) * c.g_stride + n;
      turn(c.x + (i * f.c * f.d + j + e) * c.x_stride + n, xs, f.c, samples, scratch);
      const float* w = scratch;
      panels(total, 1, [&](const Phase&, i64 t, i64 columns) {
        const bool cut = direct && t + columns == total;
        run({g, gs, 1, &h, w, columns * W, W, samples, y + t * W, ys, W, f.b, cut ? lanes_of(f.c) : W, n > 0, true,
             false, false, nullptr, 0, 0, 0}, (int)columns);
        w += columns * samples * W;
      });
    }
  }
  if (!direct)
    for (i64 k = 0; k < f.b; k++)
      interleave(sums + k * width, step, count, f.c, c.w + (i * f.b + k) * f.c * f.d + j, f.d);
}

int gradient_last(const Gradient& c) {
  const Factor& f = c.factor;
  if (f.c < W / 2) {
    share(f.a * f.d, c.threads, [&](i64 t, i64) { narrow_group(c, t / f.d, t % f.d); });
    return 0;
  }
  i64 together = least(f.d, W);
  if (uneven(f.a * ceil_div(f.d, together), c.threads)) together = most(1, least(together, f.d / c.threads));
  const i64 width = ceil_div(f.c, W) * W, tasks = ceil_div(f.d, together);
  Plan plan = {most(64, least(256, CACHE / width / W * W)), 0, 0};
  plan.chunk = least(plan.chunk, c.batch);
  plan.turned = plan.chunk * width;
  plan.sums = f.d == 1 ? 0 : together * f.b * width;
  float* scratch = c.scratch((size_t)(c.threads * (plan.turned + plan.sums)));
  if (!scratch) return 2;
  share(f.a * tasks, c.threads, [&](i64 t, i64 thread) {
    const i64 j = t % tasks * together;
    groups_last(c, plan, t / tasks, j, least(together, f.d - j), scratch + thread * (plan.turned + plan.sums));
  });
  return 0;
}

int gradient_first(const Gradient& c) {
  const Factor& f = c.factor;
  const i64 in = f.c * f.d, out = f.b * f.d;
  if (is_small(f)) {
    const i64 groups = ceil_div(f.a, tiny_blocks(f)), each = ceil_div(groups, c.threads);
    float* sums = c.scratch((size_t)(groups * f.b * W));
    if (!sums) return 2;
    share(c.threads, c.threads, [&](i64 t, i64) { small_first(c, sums, t * each, least((t + 1) * each, groups)); });
    return 0;
  }
  const i64 parts = f.a >= c.threads ? 1 : c.threads, each = ceil_div(f.a * parts, c.threads);
  const bool far = c.batch * f.a * (in + out) > 8 * L2;
  // Super-blocks that go through the batch together: one where nothing is far, else as many as keep their sums near.
  const i64 together = far ? most(1, least(f.a, L2 / 2 / (out * f.c))) : 1, blocks = together + (parts > 1);
  const i64 chunk = least(c.batch, most(24, least(128, L2 / 2 / (blocks * (in + out))))), size = chunk * blocks * apart(in);
  float* copies = far ? c.scratch((size_t)(c.threads * size)) : nullptr;
  if (far && !copies) return 2;
  share(c.threads, c.threads, [&](i64 t, i64) {
    const i64 end = least((t + 1) * each, f.a * parts);
    for (i64 from = t * each; from < end; from += together * parts)
      range_first(c, chunk, far ? copies + t * size : nullptr, from, least(from + together * parts, end), parts);
  });
  return 0;
}

int gradient(const Gradient& c) { return c.layout == LAST ? gradient_last(c) : gradient_first(c); }

}  // namespace
