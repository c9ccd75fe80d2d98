// One factor on a tile of the batch: packing its entries, and the product in both layouts.
namespace {

inline bool is_tiny(const Factor& f) { return PERMUTES && f.a > 1 && most(f.b, f.c) * f.d <= (f.c <= 4 ? W : W / 2); }
inline bool is_held(const Factor& f) {
  return f.sd == 1 && f.d % W == 0 && most(f.b, f.c) <= (W == 16 ? 4 : 2);
}
// Batch last: the few entries of a group stay in registers while its columns pass.
inline bool is_held_last(const Factor& f) { return most(f.b, f.c) <= (W == 16 ? 4 : 2); }
inline i64 tiny_blocks(const Factor& f) { return W / (most(f.b, f.c) * f.d); }

inline size_t packed_size(const Factor& f, int layout) {
  if (layout == LAST) return f.d == 1 || is_held_last(f) ? 0 : (size_t)(f.a * f.b * f.c * f.d);
  if (is_tiny(f)) return (size_t)(ceil_div(f.a, tiny_blocks(f)) * f.c * W);
  if (f.d % W == 0 && f.sd == 1) return 0;
  return (size_t)(f.a * ceil_div(f.b * f.d, W) * f.c * W);
}

// Where (l, j) run along memory and W / D outputs share a vector: square transposes.
template <int D> void pack_turned(const Factor& f, const float* w, i64 total, float* out) {
  constexpr i64 N = W / D;
  panels(total, f.d, [&](const Phase&, i64 t, i64 columns) {
    for (i64 v = 0; v < columns; v++) {
      i64 k = (t + v) * N, l = 0;
      if (k + N <= f.b)
        for (; l + N <= f.c; l += N)
          transpose<D>(w + k * f.sb + l * D, f.sb, out + l * columns * W + v * W, columns * W);
      for (; l < f.c; l++)
        for (i64 e = 0; e < W; e++) {
          const float* s = w + (k + e / D) * f.sb + l * D + e % D;
          out[(l * columns + v) * W + e] = k + e / D < f.b ? *s : 0.0f;
        }
    }
    out += columns * f.c * W;
  });
}

// Entries of super-block i in the order in which the tiles read them: panels, then l, then lanes; padded with zeros.
void pack_first(const Factor& f, i64 i, float* out, float* line) {
  const float* w = f.w + i * f.sa;
  const i64 width = f.b * f.d, total = ceil_div(width, W), period = period_of(f.d);
  out += i * total * f.c * W;
  if (f.sc == f.d && (f.sd == 1 || f.d == 1)) {
    if (f.d == 1) return pack_turned<1>(f, w, total, out);
    if constexpr (TURNS) {
      if (f.d == 2) return pack_turned<2>(f, w, total, out);
      if (f.d == 4) return pack_turned<4>(f, w, total, out);
    }
  }
  const bool whole = f.sd == 1 && (f.sb == f.d || f.b == 1);
  for (i64 t = 0; t < W; t++) line[total * W - W + t] = 0.0f;
  for (i64 l = 0; l < f.c; l++) {
    const float* row = w + l * f.sc;
    if (!whole) {
      for (i64 k = 0; k < f.b; k++) {
        const float* s = row + k * f.sb;
        float* o = line + k * f.d;
        if (f.sd != 1) for (i64 j = 0; j < f.d; j++) o[j] = s[j * f.sd];
        else if (f.d == 2) memcpy(o, s, 8);
        else if (f.d == 4) memcpy(o, s, 16);
        else if (f.d < 4) for (i64 j = 0; j < f.d; j++) o[j] = s[j];
        else for (i64 j = 0; j < f.d; j += W) {
          if (j + W <= f.d) store(o + j, load(s + j));
          else store(o + j, load(s + j, first_lanes(f.d - j)), first_lanes(f.d - j));
        }
      }
    }
    const float* from = whole ? row : line;
    const mask last = first_lanes(lanes_of(width));
    float* o = out;
    panels(total, f.d, [&](const Phase&, i64 t, i64 columns) {
      for (i64 v = 0; v < columns; v++) {
        i64 at = t + v * period;
        store(o + (l * columns + v) * W, at == total - 1 ? load(from + at * W, last) : load(from + at * W));
      }
      o += columns * f.c * W;
    });
  }
}

void pack_tiny(const Factor& f, float* out) {
  const i64 blocks = tiny_blocks(f);
  for (i64 i = 0; i < f.a; i += blocks)
    for (i64 l = 0; l < f.c; l++, out += W) {
      i64 e = 0;
      for (i64 g = i; g < least(i + blocks, f.a); g++)
        for (i64 k = 0; k < f.b; k++)
          for (i64 j = 0; j < f.d; j++) out[e++] = f.w[g * f.sa + k * f.sb + l * f.sc + j * f.sd];
      for (; e < W; e++) out[e] = 0.0f;
    }
}

// Whether outputs lie nearer to each other than inputs, as in a transposed factor.
inline bool is_turned(const Factor& f) { return f.sb < f.sc; }

// out[j * step + e] = in[e * D + j].
template <int D> INLINE void part(const float* in, i64 n, float* out, i64 step) {
  for (i64 e = 0; e < n; e++)
    for (int j = 0; j < D; j++) out[j * step + e] = in[e * D + j];
}

// Batch last: entries of (i, j) as a dense matrix, (b, c) or, of a transposed factor, (c, b): as they come.
void pack_last(const Factor& f, i64 i, float* out) {
  const i64 size = f.b * f.c;
  const bool turned = is_turned(f);
  const i64 rows = turned ? f.c : f.b, row = turned ? f.sc : f.sb, n = turned ? f.b : f.c, step = turned ? f.sb : f.sc;
  out += i * f.d * size;
  for (i64 k = 0; k < rows; k++) {
    const float* w = f.w + i * f.sa + k * row;
    float* o = out + k * n;
    if (f.sd == 1 && step == f.d && (f.d == 2 || f.d == 4)) {
      if (f.d == 2) part<2>(w, n, o, size);
      else part<4>(w, n, o, size);
      continue;
    }
    i64 l = 0;
    if (f.sd == 1 && f.d >= W)
      for (; l + W <= n; l += W) {
        i64 j = 0;
        for (; j + W <= f.d; j += W) transpose<1>(w + l * step + j, step, o + j * size + l, size);
        for (; j < f.d; j++)
          for (i64 e = l; e < l + W; e++) o[j * size + e] = w[e * step + j];
      }
    if (f.d < 8)
      for (i64 j = 0; j < f.d; j++)
        for (i64 e = l; e < n; e++) o[j * size + e] = w[e * step + j * f.sd];
    else
      for (; l < n; l++)
        for (i64 j = 0; j < f.d; j++) o[j * size + l] = w[l * step + j * f.sd];
  }
}

template <int C> void tiny_rows(const Ready& q, const float* x, i64 xs, float* y, i64 ys, i64 n) {
  const Factor& f = q.f;
  const i64 blocks = tiny_blocks(f), in = f.c * f.d, out = f.b * f.d;
  index idx[C];
  for (int l = 0; l < C; l++) {
    int lanes[W];
    for (i64 e = 0; e < W; e++) lanes[e] = e / out < blocks ? (int)(e / out * in + l * f.d + e % f.d) : 0;
    idx[l] = indices(lanes);
  }
  for (i64 r = 0; r < n; r += 4) {
    const i64 height = least(4, n - r);
    const float* w = q.packed;
    for (i64 i = 0; i < f.a; i += blocks, w += C * W) {
      const i64 here = least(blocks, f.a - i);
      const mask read = first_lanes(here * in), write = first_lanes(here * out);
      vec wl[C];
      for (int l = 0; l < C; l++) wl[l] = load(w + l * W);
      const float* p = x + r * xs + i * in;
      float* o = y + r * ys + i * out;
      const bool full = here * out == W;
      if (height == 4) {
        vec s[4], t[4];
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) s[e] = load(p + e * xs, read);
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) {
          t[e] = zero();
#pragma GCC unroll 8
          for (int l = 0; l < C; l++) t[e] = fma(wl[l], permute(s[e], idx[l]), t[e]);
        }
#pragma GCC unroll 4
        for (int e = 0; e < 4; e++) {
          if (full) store(o + e * ys, t[e]);
          else store(o + e * ys, t[e], write);
        }
        continue;
      }
      for (i64 e = 0; e < height; e++) {
        vec s = load(p + e * xs, read), t = zero();
        for (int l = 0; l < C; l++) t = fma(wl[l], permute(s, idx[l]), t);
        store(o + e * ys, t, write);
      }
    }
  }
}

void tiny_first(const Ready& q, const float* x, i64 xs, float* y, i64 ys, i64 n) {
  switch (q.f.c) {
    case 1: return tiny_rows<1>(q, x, xs, y, ys, n);
    case 2: return tiny_rows<2>(q, x, xs, y, ys, n);
    case 3: return tiny_rows<3>(q, x, xs, y, ys, n);
    case 4: return tiny_rows<4>(q, x, xs, y, ys, n);
    case 5: return tiny_rows<5>(q, x, xs, y, ys, n);
    case 6: return tiny_rows<6>(q, x, xs, y, ys, n);
    case 7: return tiny_rows<7>(q, x, xs, y, ys, n);
    default: return tiny_rows<8>(q, x, xs, y, ys, n);
  }
}

template <int B, int C> void held_rows(const Factor& f, const float* x, i64 xs, float* y, i64 ys, i64 n, bool stream) {
  const i64 d = f.d;
  for (i64 i = 0; i < f.a; i++)
    for (i64 j = 0; j < d; j += W) {
      vec w[B][C];
#pragma GCC unroll 4
      for (int k = 0; k < B; k++)
#pragma GCC unroll 4
        for (int l = 0; l < C; l++) w[k][l] = load(f.w + i * f.sa + k * f.sb + l * f.sc + j);
      const float* p = x + i * C * d + j;
      float* o = y + i * B * d + j;
      for (i64 r = 0; r < n; r++, p += xs, o += ys) {
        vec s[B];
#pragma GCC unroll 4
        for (int k = 0; k < B; k++) s[k] = zero();
#pragma GCC unroll 4
        for (int l = 0; l < C; l++) {
          vec v = load(p + l * d);
#pragma GCC unroll 4
          for (int k = 0; k < B; k++) s[k] = fma(w[k][l], v, s[k]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < B; k++) {
          if (stream) store_through(o + k * d, s[k]);
          else store(o + k * d, s[k]);
        }
      }
    }
}

template <int B> void held_by_width(const Factor& f, const float* x, i64 xs, float* y, i64 ys, i64 n, bool stream) {
  if constexpr (W == 16) {
    if (f.c == 4) return held_rows<B, 4>(f, x, xs, y, ys, n, stream);
    if (f.c == 3) return held_rows<B, 3>(f, x, xs, y, ys, n, stream);
  }
  return f.c == 2 ? held_rows<B, 2>(f, x, xs, y, ys, n, stream) : held_rows<B, 1>(f, x, xs, y, ys, n, stream);
}

// stream: y is far from the cache and will not be read soon.
void held_first(const Factor& f, const float* x, i64 xs, float* y, i64 ys, i64 n, bool stream) {
  stream = stream && ((uintptr_t)y & 63) == 0 && ys % W == 0;
  if constexpr (W == 16) {
    if (f.b == 4) return held_by_width<4>(f, x, xs, y, ys, n, stream);
    if (f.b == 3) return held_by_width<3>(f, x, xs, y, ys, n, stream);
  }
  return f.b == 2 ? held_by_width<2>(f, x, xs, y, ys, n, stream) : held_by_width<1>(f, x, xs, y, ys, n, stream);
}

// Super-block i of one factor, batch first: n rows. next: the same of the block to come, or nothing.
void block_first(const Ready& q, i64 i, const float* x, i64 xs, float* y, i64 ys, i64 n, const float* next, bool far) {
  const Factor& f = q.f;
  const i64 width = f.b * f.d, total = ceil_div(width, W), period = period_of(f.d);
  const float* w = q.packed + (q.way == PACKED ? i * total * f.c * W : 0);
  const bool cold = next && xs % PAGE != 0, fetch = cold && f.b >= FETCH;
  i64 done = 0;
  panels(total, f.d, [&](const Phase& h, i64 t, i64 columns) {
    bool ends = t + (columns - 1) * period == total - 1;
    Job j = {x + i * f.c * f.d + h.offset, xs, f.d, &h, w, columns * W, W, f.c,
             y + i * width + t * W, ys, period * W, n, ends ? lanes_of(width) : W, false, true,
             cold, far, nullptr, 0, xs, ceil_div(f.c * f.d, 16)};
    if (fetch) {
      const i64 from = done * n / total, to = (done + columns) * n / total;
      j.next = next + from * xs;
      j.next_rows = to - from;
    }
    done += columns;
    if (q.way == DIRECT) {
      j.w = f.w + i * f.sa + t * W / f.d * f.sb + h.offset;
      j.ws = f.sc;
      j.wv = f.sb;
    }
    run(j, (int)columns);
    w += columns * f.c * W;
  });
}

template <int B, int C> void held_columns(const Factor& f, const float* w, const float* x, i64 xs, float* y, i64 ys,
                                          i64 n, bool stream) {
  vec s[B][C];
#pragma GCC unroll 4
  for (int k = 0; k < B; k++)
#pragma GCC unroll 4
    for (int l = 0; l < C; l++) s[k][l] = all(w[k * f.sb + l * f.sc]);
  for (i64 t = 0; t < n; t += W) {
    const bool whole = t + W <= n;
    const mask m = first_lanes(n - t);
    vec out[B];
#pragma GCC unroll 4
    for (int k = 0; k < B; k++) out[k] = zero();
#pragma GCC unroll 4
    for (int l = 0; l < C; l++) {
      const vec v = whole ? load(x + l * xs + t) : load(x + l * xs + t, m);
#pragma GCC unroll 4
      for (int k = 0; k < B; k++) out[k] = fma(s[k][l], v, out[k]);
    }
#pragma GCC unroll 4
    for (int k = 0; k < B; k++) {
      if (!whole) store(y + k * ys + t, out[k], m);
      else if (stream) store_through(y + k * ys + t, out[k]);
      else store(y + k * ys + t, out[k]);
    }
  }
}

template <int B> void columns_by_width(const Factor& f, const float* w, const float* x, i64 xs, float* y, i64 ys, i64 n,
                                       bool stream) {
  if constexpr (W == 16) {
    if (f.c == 4) return held_columns<B, 4>(f, w, x, xs, y, ys, n, stream);
    if (f.c == 3) return held_columns<B, 3>(f, w, x, xs, y, ys, n, stream);
  }
  return f.c == 2 ? held_columns<B, 2>(f, w, x, xs, y, ys, n, stream)
                  : held_columns<B, 1>(f, w, x, xs, y, ys, n, stream);
}

// Group (i, j) of a factor with few entries a group.
void held_last(const Factor& f, i64 i, i64 j, const float* x, i64 xs, float* y, i64 ys, i64 n, bool far) {
  const float* w = f.w + i * f.sa + j * f.sd;
  x += (i * f.c * f.d + j) * xs;
  y += (i * f.b * f.d + j) * ys;
  const bool stream = far && ((uintptr_t)y & 63) == 0 && ys % 16 == 0;
  xs *= f.d;
  ys *= f.d;
  if constexpr (W == 16) {
    if (f.b == 4) return columns_by_width<4>(f, w, x, xs, y, ys, n, stream);
    if (f.b == 3) return columns_by_width<3>(f, w, x, xs, y, ys, n, stream);
  }
  return f.b == 2 ? columns_by_width<2>(f, w, x, xs, y, ys, n, stream)
                  : columns_by_width<1>(f, w, x, xs, y, ys, n, stream);
}

// Group (i, j) of one factor, batch last: n columns.
void group_last(const Ready& q, i64 i, i64 j, const float* x, i64 xs, float* y, i64 ys, i64 n, bool cold, bool far) {
  const Factor& f = q.f;
  if (q.way == HELD) return held_last(f, i, j, x, xs, y, ys, n, far);
  Phase h = phase_of(1, 0);
  i64 total = ceil_div(n, W), groups = ceil_div(total, COLS), base = total / groups, extra = total % groups, t = 0;
  const float* w = q.way == PACKED ? q.packed + (i * f.d + j) * f.b * f.c : f.w + i * f.sa + j * f.sd;
  const bool packed = q.way == PACKED, turned = is_turned(f);
  const i64 rs = !packed ? f.sb : turned ? 1 : f.c, ls = !packed ? f.sc : turned ? f.b : 1;
  for (i64 g = 0; g < groups; g++) {
    i64 columns = base + (g < extra);
    bool ends = t + columns == total;
    Job job = {w, rs, ls, &h, x + (i * f.c * f.d + j) * xs + t * W, f.d * xs, W, f.c,
               y + (i * f.b * f.d + j) * ys + t * W, f.d * ys, W, f.b, ends ? lanes_of(n) : W, false, false,
               cold, far, x + (i * f.c * f.d + j) * xs + (t + columns) * W, 0, f.d * xs, 0};
    if (cold && !ends && f.b >= FETCH) {
      job.next_rows = f.c;
      job.next_lines = least(COLS, total - t - columns) * W / 16;
    }
    run(job, (int)columns);
    t += columns;
  }
}

}  // namespace
