// The one register tile behind every product here:
//   y[r][v] (+)= sum_l spread(p + r * rs + l * ls) * w[l * ws + v * wv]
// Forward, batch first: rows are samples, lanes are outputs (k, j) of one super-block. Forward, batch last: rows are
// outputs k, lanes are samples. Gradient of the entries: rows are outputs k, lanes are inputs (l, j), l runs over samples.
namespace {

// How the d values shared by all k meet the lanes of vector t: phase t % period, period = d / gcd(d, W).
struct Phase {
  int kind;
  i64 offset, d;
  mask lo, hi;
  index idx;
};

inline i64 ceil_div(i64 p, i64 q) { return (p + q - 1) / q; }
inline i64 least(i64 p, i64 q) { return p < q ? p : q; }
inline i64 most(i64 p, i64 q) { return p > q ? p : q; }
inline i64 lanes_of(i64 width) { return width % W ? width % W : W; }

inline i64 period_of(i64 d) {
  i64 u = d, v = W;
  while (v) { i64 t = u % v; u = v; v = t; }
  return d / u;
}

inline Phase phase_of(i64 d, i64 f) {
  int lanes[W] = {0};
  Phase h = {SET1, 0, d, first_lanes(W), later_lanes(W), indices(lanes)};
  i64 start = (W * f) % d;
  if (d == 1) return h;
  if (d < W && W % d == 0) {
    h.kind = d == 2 ? TWO : d == 4 ? FOUR : EIGHT;
  } else if (d < W) {
    h.kind = PERMUTE;
    h.lo = first_lanes(d);
    for (int e = 0; e < W; e++) { lanes[e] = (int)start; if (++start == d) start = 0; }
    h.idx = indices(lanes);
  } else {
    h.kind = start + W <= d ? PLAIN : WRAP;
    h.offset = start;
    h.lo = first_lanes(d - start);
    h.hi = later_lanes(d - start);
  }
  return h;
}

struct Job {
  const float* p; i64 rs, ls; const Phase* phase;
  const float* w; i64 ws, wv, len;
  float* y; i64 ys, yv, n;
  i64 lanes;  // of the last vector of a row
  bool accumulate, padded;  // padded: w may be read in whole vectors
  // Where memory is far: lines to be written are asked for early, and what the next job will read is fetched meanwhile,
  // as rows of 64-byte lines.
  // far: the outputs are too many for any cache to keep them for their reader.
  bool cold, far;
  const float* next; i64 next_rows, next_stride, next_lines;
};

// Floats of a page: rows a multiple of it apart share one set of the first cache, which holds eight of them.
constexpr i64 PAGE = 1024;
constexpr i64 FETCH = 16;  // sums of fewer terms are over before a line arrives

template <int M, int R, int C, bool MASKED> INLINE void tile(const Job& j, const float* p, float* y) {
  vec acc[R][C];
  const mask last = first_lanes(j.lanes), lo = j.phase->lo, hi = j.phase->hi;
  const index idx = j.phase->idx;
  const i64 rs = j.rs, ls = j.ls, ws = j.ws, wv = j.wv, d = j.phase->d, ys = j.ys, yv = j.yv;
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < C; v++) acc[r][v] = zero();
  const bool through = j.far && ((uintptr_t)y & 63) == 0 && ys % 16 == 0 && yv % 16 == 0;
  if ((j.cold && !through && j.len >= FETCH) || j.accumulate)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < C; v++) __builtin_prefetch(y + r * ys + v * yv, 1);
  const float* w = j.w;
  for (i64 l = 0; l < j.len; l++) {
    vec wl[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; v++) wl[v] = MASKED && v == C - 1 ? load(w + v * wv, last) : load(w + v * wv);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      vec s = spread<M>(p + r * rs, lo, hi, d, idx);
#pragma GCC unroll 4
      for (int v = 0; v < C; v++) acc[r][v] = fma(wl[v], s, acc[r][v]);
    }
    w += ws;
    p += ls;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < C; v++) {
      // What was there is added last: until then its lines have arrived.
      if (j.accumulate) acc[r][v] = add(acc[r][v], v == C - 1 ? load(y + r * ys + v * yv, last) : load(y + r * ys + v * yv));
      if (v == C - 1 && j.lanes < W) store(y + r * ys + v * yv, acc[r][v], last);
      else if (through) store_through(y + r * ys + v * yv, acc[r][v]);
      else store(y + r * ys + v * yv, acc[r][v]);
    }
}

template <int M, int C, bool MASKED, int R> INLINE void sized(int rows, const Job& j, const float* p, float* y) {
  if constexpr (R > 0) {
    if (rows == R) tile<M, R, C, MASKED>(j, p, y);
    else sized<M, C, MASKED, R - 1>(rows, j, p, y);
  }
}

// All rows of a job, in tiles of nearly equal height.
template <int M, int C, bool MASKED> void rows(const Job& j) {
  const i64 most = ROWS[C] > 6 && j.rs % PAGE == 0 ? 6 : ROWS[C];
  i64 groups = (j.n + most - 1) / most, base = j.n / groups, extra = j.n % groups;
  const float* p = j.p;
  float* y = j.y;
  for (i64 g = 0; g < groups; g++) {
    i64 r = base + (g < extra);
    for (i64 e = g * j.next_rows / groups; e < (g + 1) * j.next_rows / groups; e++)
      for (i64 line = 0; line < j.next_lines; line++) __builtin_prefetch(j.next + e * j.next_stride + 16 * line, 0, 2);
    sized<M, C, MASKED, ROWS[C]>((int)r, j, p, y);
    p += r * j.rs;
    y += r * j.ys;
  }
}

typedef void (*Rows)(const Job&);
template <bool MASKED, int C> Rows by_kind(int kind) {
  switch (kind) {
    case SET1: return rows<SET1, C, MASKED>;
    case TWO: return rows<TWO, C, MASKED>;
    case FOUR: return W > 4 ? rows<FOUR, C, MASKED> : nullptr;
    case EIGHT: return W > 8 ? rows<EIGHT, C, MASKED> : nullptr;
    case PLAIN: return rows<PLAIN, C, MASKED>;
    case PERMUTE: return rows<PERMUTE, C, MASKED>;
    default: return rows<WRAP, C, MASKED>;
  }
}

template <bool MASKED> Rows by_width(int columns, int kind) {
  if constexpr (COLS > 2) {
    if (columns == 4) return by_kind<MASKED, 4>(kind);
    if (columns == 3) return by_kind<MASKED, 3>(kind);
  }
  return columns == 2 ? by_kind<MASKED, 2>(kind) : by_kind<MASKED, 1>(kind);
}

void run(const Job& j, int columns) {
  // With sixteen lanes a masked load costs nothing, so one instance serves both.
  bool masked = W == 16 || (!j.padded && j.lanes < W);
  (masked ? by_width<true>(columns, j.phase->kind) : by_width<W == 16>(columns, j.phase->kind))(j);
}

// Calls visit(phase, first vector, columns) for the panels of vectors of equal phase that cover `total` vectors.
template <class Visit> INLINE void panels(i64 total, i64 d, Visit visit) {
  i64 period = period_of(d);
  for (i64 f = 0; f < period && f < total; f++) {
    Phase h = phase_of(d, f);
    i64 count = (total - f + period - 1) / period, groups = (count + COLS - 1) / COLS;
    i64 base = count / groups, extra = count % groups, t = f;
    for (i64 g = 0; g < groups; g++) {
      i64 columns = base + (g < extra);
      visit(h, t, columns);
      t += columns * period;
    }
  }
}

}  // namespace
