// Causal linear attention with one instruction set. A chunk of C positions is copied into padded rows, the feature map
// applied on the way; products of small matrices do the rest. With P = lower(q k^T), S and z the state before:
//   out = (P v + q S) / (rows of P + q z + eps),   S' = S + k^T v,   z' = z + sum k
// Backward, with g already divided and h the derivative of the denominators, dP = lower(g v^T + h 1^T):
//   first to last:  dq = dP k + g S^T + h z^T;   last to first, R = sum of later q^T g, r = sum of later q^T h:
//   dk = dP^T q + v R^T + r,   dv = P^T g + k R.
#include "call.h"
#include "../lanes.h"
namespace {

constexpr i64 W = LANES;
constexpr i64 C = 32;  // positions of a chunk
constexpr i64 FEW = 4;  // positions from which products of matrices pay
constexpr float EPSILON = 1e-6f;
constexpr int COLS = LANES == 16 ? 4 : 2, ROWS = LANES == 4 ? 4 : 6;

inline i64 padded(i64 n) { return (n + W - 1) / W * W; }
inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline vec mapped(vec x, i64 map) { return map == ELU ? (x > 0.0f ? x + 1.0f : exponential(x < 0.0f ? x : all(0.0f))) : x; }

// A row into `wide` floats, zeros after its end.
inline void copy_row(const float* in, i64 size, float* out, i64 wide, i64 map) {
  i64 e = 0;
  for (; e + W <= size; e += W) store(out + e, mapped(load(in + e), map));
  if (e < wide) {
    float rest[LANES] = {0};
    memcpy(rest, in + e, (size - e) * sizeof(float));
    vec v = mapped(load(rest), map);
    store(rest, v);
    for (i64 l = size - e; l < W; l++) rest[l] = 0.0f;
    store(out + e, load(rest));
  }
}

// Rows of the next chunk travel to the second cache while products of this one are computed, some at a time: rows of a
// head are far apart, and no hardware follows them.
struct Ahead {
  const float* at[5];
  i64 time[5], size[5], rows, row;
  int count;

  Ahead() : rows(0), row(0), count(0) {}
  void add(const Rows& in, i64 b, i64 h, i64 t, i64 wide) {
    at[count] = in.at + b * in.batch + h * in.head + t * in.time;
    time[count] = in.time;
    size[count++] = wide;
  }
  void some(i64 many) {
    for (const i64 end = row + many < rows ? row + many : rows; row < end; row++)
      for (int n = 0; n < count; n++)
        for (i64 e = 0; e < size[n]; e += 16) __builtin_prefetch(at[n] + row * time[n] + e, 0, 2);
  }
};

// `count` rows of a head from position t on, zeros up to whole vectors of rows.
inline void copy_rows(const Rows& in, i64 b, i64 h, i64 t, i64 count, i64 size, float* out, i64 map) {
  const i64 wide = padded(size);
  const float* at = in.at + b * in.batch + h * in.head + t * in.time;
  for (i64 r = 0; r < count; r++) copy_row(at + r * in.time, size, out + r * wide, wide, map);
  memset(out + count * wide, 0, (padded(count) - count) * wide * sizeof(float));
}

// in (rows, cols), out (cols, rows), both multiples of four.
inline void turn(const float* in, i64 rows, i64 cols, float* out) {
  for (i64 c = 0; c < cols; c += 4)
    for (i64 r = 0; r < rows; r += 4) {
      const float* p = in + r * cols + c;
      float* o = out + c * rows + r;
      const four x = *(const four*)p, y = *(const four*)(p + cols), z = *(const four*)(p + 2 * cols);
      const four w = *(const four*)(p + 3 * cols);
      const four a = __builtin_shufflevector(x, y, 0, 4, 1, 5), b = __builtin_shufflevector(z, w, 0, 4, 1, 5);
      const four d = __builtin_shufflevector(x, y, 2, 6, 3, 7), e = __builtin_shufflevector(z, w, 2, 6, 3, 7);
      *(four*)o = __builtin_shufflevector(a, b, 0, 1, 4, 5);
      *(four*)(o + rows) = __builtin_shufflevector(a, b, 2, 3, 6, 7);
      *(four*)(o + 2 * rows) = __builtin_shufflevector(d, e, 0, 1, 4, 5);
      *(four*)(o + 3 * rows) = __builtin_shufflevector(d, e, 2, 3, 6, 7);
    }
}

// c[m][n] (+)= sum over from <= k < to of a[m * am + k * ak] * b[k * ldb + n]
struct Product {
  const float* a; i64 am, ak;
  const float* b; i64 ldb;
  float* c; i64 ldc;
  bool add;
};

template <int R, int N> inline void tile(const Product& p, i64 m, i64 n, i64 from, i64 to) {
  vec acc[R][N];
  float* c = p.c + m * p.ldc + n;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) acc[r][v] = p.add ? load(c + r * p.ldc + v * W) : vec{};
  const float* a = p.a + m * p.am;
  const float* b = p.b + n;
  for (i64 k = from; k < to; k++) {
    vec right[N];
    for (int v = 0; v < N; v++) right[v] = load(b + k * p.ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vec left = all(a[r * p.am + k * p.ak]);
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) acc[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) store(c + r * p.ldc + v * W, acc[r][v]);
}

template <int R> inline void columns(const Product& p, i64 m, i64 n, i64 from, i64 to) {
  i64 at = 0;
  for (; at + COLS * W <= n; at += COLS * W) tile<R, COLS>(p, m, at, from, to);
  for (; at < n; at += W) tile<R, 1>(p, m, at, from, to);
}

// WHOLE: all k. LOWER: a[m][k] is zero for k > m. UPPER: a[m][k] is zero for k < m. PART: only n <= m is wanted.
enum { WHOLE, LOWER, UPPER, PART };

void product(const Product& p, i64 rows, i64 n, i64 depth, int shape, Ahead& ahead) {
  for (i64 m = 0; m < rows;) {
    ahead.some(2);
    const i64 r = least(ROWS, rows - m), end = m + r;
    const i64 from = shape == UPPER ? m : 0, to = shape == LOWER ? least(depth, end) : depth;
    const i64 wide = shape == PART ? least(n, padded(end)) : n;
    switch (r) {
      case 6: columns<6>(p, m, wide, from, to); break;
      case 5: columns<5>(p, m, wide, from, to); break;
      case 4: columns<4>(p, m, wide, from, to); break;
      case 3: columns<3>(p, m, wide, from, to); break;
      case 2: columns<2>(p, m, wide, from, to); break;
      default: columns<1>(p, m, wide, from, to);
    }
    m = end;
  }
}

// Zeros above the diagonal of the first rows, up to whole vectors; `add` to each entry at and below it.
void lower(float* p, i64 rows, const float* add) {
  for (i64 m = 0; m < rows; m++) {
    if (add) for (i64 n = 0; n <= m; n++) p[m * C + n] += add[m];
    for (i64 n = m + 1; n < padded(rows); n++) p[m * C + n] = 0.0f;
  }
}

inline float total(vec v) {
  float part[LANES];
  store(part, v);
  for (int half = LANES / 2; half; half /= 2)
    for (int l = 0; l < half; l++) part[l] += part[l + half];
  return part[0];
}

inline vec products(const float* a, const float* b, i64 n) {
  vec s = vec{};
  for (i64 e = 0; e < n; e += W) s += load(a + e) * load(b + e);
  return s;
}

void add_row(float* y, const float* x, float by, i64 n) {
  for (i64 e = 0; e < n; e += W) store(y + e, load(y + e) + all(by) * load(x + e));
}

// A (rows, cols) matrix of a state into `all` padded rows, and back.
void spread(const float* in, i64 rows, i64 cols, float* out, i64 all) {
  const i64 wide = padded(cols);
  for (i64 r = 0; r < all; r++)
    for (i64 c = 0; c < wide; c++) out[r * wide + c] = r < rows && c < cols ? in[r * cols + c] : 0.0f;
}
void gather(const float* in, i64 rows, i64 cols, float* out) {
  for (i64 r = 0; r < rows; r++) memcpy(out + r * cols, in + r * padded(cols), cols * sizeof(float));
}

// What a thread works on. d and m are the padded sizes.
struct Room {
  i64 d, m;
  float *q, *k, *v, *g, *turned, *pairs, *more, *out, *state, *other, *sums, *h, *scale;
  static i64 size(i64 d, i64 m) {
    const i64 wide = d > m ? d : m;
    return 2 * C * d + 2 * C * m + C * wide + 2 * C * C + C * wide + 2 * d * m + d + 2 * C;
  }
  Room(float* p, i64 features, i64 values) : d(padded(features)), m(padded(values)) {
    const i64 wide = d > m ? d : m;
    q = p; k = q + C * d; v = k + C * d; g = v + C * m; turned = g + C * m; pairs = turned + C * wide;
    more = pairs + C * C; out = more + C * C; state = out + C * wide; other = state + d * m; sums = other + d * m;
    h = sums + d; scale = h + C;
  }
};

// V vectors of columns of a state that moves on by one position, and q^T of it.
struct Moved {
  const float *q, *k, *v, *from;
  float* to;
  i64 features, values;
  float by, *out;
};

template <int V> inline void move(const Moved& p, i64 m, i64 left) {
  vec add[V], sum[V] = {};
  for (int e = 0; e < V; e++) add[e] = load(p.v + m + e * W, left);
  for (i64 d = 0; d < p.features; d++)
#pragma GCC unroll 4
    for (int e = 0; e < V; e++) {
      const i64 at = d * p.values + m + e * W;
      const vec s = load(p.from + at, left) + p.k[d] * add[e];
      store(p.to + at, s, left);
      sum[e] += p.q[d] * s;
    }
  for (int e = 0; e < V; e++) store(p.out + m + e * W, sum[e] * p.by, left);
}

// Few positions, as in generation: the state is read and written once for each, where it lies.
void steps(const Call& c, i64 b, i64 h, const Room& w) {
  const i64 at = b * c.heads + h, D = c.features, M = c.values;
  const float *from = c.memory + at * D * M, *sums = c.keys + at * D;
  float *to = c.last_memory + at * D * M, *keys = c.last_keys + at * D;
  for (i64 t = 0; t < c.length; t++) {
    copy_row(c.q.at + b * c.q.batch + h * c.q.head + t * c.q.time, D, w.q, w.d, c.map);
    copy_row(c.k.at + b * c.k.batch + h * c.k.head + t * c.k.time, D, w.k, w.d, c.map);
    float bottom = 0.0f;
    for (i64 d = 0; d < D; d++) {
      keys[d] = sums[d] + w.k[d];
      bottom += w.q[d] * keys[d];
    }
    c.bottom[at * c.length + t] = bottom;
    const float by = c.normalize ? 1.0f / (bottom + EPSILON) : 1.0f;
    const Moved p = {w.q, w.k, c.v.at + b * c.v.batch + h * c.v.head + t * c.v.time, from, to, D, M, by,
                     c.out + ((b * c.length + t) * c.heads + h) * M};
    i64 m = 0;
    for (; m + 4 * W <= M; m += 4 * W) move<4>(p, m, W);
    for (; m + W <= M; m += W) move<1>(p, m, W);
    if (m < M) move<1>(p, m, M - m);
    from = to;
    sums = keys;
  }
}

// The rows that the chunk from position t on will read.
Ahead next_chunk(const Call& c, i64 b, i64 h, i64 t) {
  Ahead next;
  if (t < 0 || t >= c.length) return next;
  next.rows = least(C, c.length - t);
  next.add(c.q, b, h, t, c.features);
  next.add(c.k, b, h, t, c.features);
  next.add(c.v, b, h, t, c.values);
  if (!c.grad.at) return next;
  next.add(c.grad, b, h, t, c.values);
  if (c.normalize) next.add({c.out, c.length * c.heads * c.values, c.values, c.heads * c.values}, b, h, t, c.values);
  return next;
}

void forward_head(const Call& c, i64 b, i64 h, float* memory) {
  Room w(memory, c.features, c.values);
  if (c.length > 0 && c.length < FEW) return steps(c, b, h, w);
  const i64 at = b * c.heads + h, D = c.features, M = c.values;
  spread(c.memory + at * D * M, D, M, w.state, w.d);
  spread(c.keys + at * D, 1, D, w.sums, 1);
  for (i64 t = 0; t < c.length; t += C) {
    const i64 n = least(C, c.length - t);
    copy_rows(c.q, b, h, t, n, D, w.q, c.map);
    copy_rows(c.k, b, h, t, n, D, w.k, c.map);
    copy_rows(c.v, b, h, t, n, M, w.v, IDENTITY);
    Ahead ahead = next_chunk(c, b, h, t + C);
    turn(w.k, padded(n), w.d, w.turned);
    product({w.q, w.d, 1, w.turned, padded(n), w.pairs, C, false}, n, padded(n), D, PART, ahead);
    lower(w.pairs, n, nullptr);
    product({w.q, w.d, 1, w.state, w.m, w.out, w.m, false}, n, w.m, D, WHOLE, ahead);
    product({w.pairs, C, 1, w.v, w.m, w.out, w.m, true}, n, w.m, n, LOWER, ahead);
    product({w.k, 1, w.d, w.v, w.m, w.state, w.m, true}, D, w.m, n, WHOLE, ahead);
    for (i64 r = 0; r < n; r++) {
      vec sum = products(w.q + r * w.d, w.sums, w.d);
      for (i64 e = 0; e <= r; e += W) sum += load(w.pairs + r * C + e);
      const float bottom = total(sum);
      c.bottom[at * c.length + t + r] = bottom;
      float* row = w.out + r * w.m;
      if (c.normalize) {
        const float by = 1.0f / (bottom + EPSILON);
        for (i64 e = 0; e < w.m; e += W) store(row + e, load(row + e) * by);
      }
      memcpy(c.out + ((b * c.length + t + r) * c.heads + h) * M, row, M * sizeof(float));
    }
    for (i64 r = 0; r < n; r++) add_row(w.sums, w.k + r * w.d, 1.0f, w.d);
  }
  gather(w.state, D, M, c.last_memory + at * D * M);
  gather(w.sums, 1, D, c.last_keys + at * D);
}

// Features, values and the derivatives of numerators (g) and denominators (h) of a chunk.
void derivatives_of_chunk(const Call& c, const Room& w, i64 b, i64 h, i64 t, i64 n) {
  copy_rows(c.q, b, h, t, n, c.features, w.q, c.map);
  copy_rows(c.k, b, h, t, n, c.features, w.k, c.map);
  copy_rows(c.v, b, h, t, n, c.values, w.v, IDENTITY);
  copy_rows(c.grad, b, h, t, n, c.values, w.g, IDENTITY);
  for (i64 r = 0; r < n; r++) w.h[r] = 0.0f;
  if (!c.normalize) return;
  for (i64 r = 0; r < n; r++) {
    float* g = w.g + r * w.m;
    const float by = 1.0f / (c.bottom[(b * c.heads + h) * c.length + t + r] + EPSILON);
    copy_row(c.out + ((b * c.length + t + r) * c.heads + h) * c.values, c.values, w.out, w.m, IDENTITY);
    w.h[r] = -total(products(g, w.out, w.m)) * by;
    for (i64 e = 0; e < w.m; e += W) store(g + e, load(g + e) * by);
  }
}

// A row of derivatives by features, through the feature map, to where it belongs.
void write_row(const Call& c, float* row, const float* features, float* to, i64 b, i64 h, i64 t, i64 d) {
  if (c.map == ELU)
    for (i64 e = 0; e < d; e += W) {
      const vec f = load(features + e);
      store(row + e, load(row + e) * (f < 1.0f ? f : all(1.0f)));
    }
  memcpy(to + ((b * c.length + t) * c.heads + h) * c.features, row, c.features * sizeof(float));
}

void backward_head(const Call& c, i64 b, i64 h, float* memory) {
  Room w(memory, c.features, c.values);
  const i64 at = b * c.heads + h, D = c.features, M = c.values;
  // First to last: the state turned, (M, D).
  spread(c.memory + at * D * M, D, M, w.other, w.d);
  turn(w.other, w.d, w.m, w.state);
  spread(c.keys + at * D, 1, D, w.sums, 1);
  for (i64 t = 0; t < c.length; t += C) {
    const i64 n = least(C, c.length - t);
    derivatives_of_chunk(c, w, b, h, t, n);
    Ahead ahead = next_chunk(c, b, h, t + C);
    turn(w.v, padded(n), w.m, w.turned);
    product({w.g, w.m, 1, w.turned, padded(n), w.pairs, C, false}, n, padded(n), M, PART, ahead);
    lower(w.pairs, n, w.h);
    product({w.g, w.m, 1, w.state, w.d, w.out, w.d, false}, n, w.d, M, WHOLE, ahead);
    product({w.pairs, C, 1, w.k, w.d, w.out, w.d, true}, n, w.d, n, LOWER, ahead);
    for (i64 r = 0; r < n; r++) {
      if (c.normalize) add_row(w.out + r * w.d, w.sums, w.h[r], w.d);
      write_row(c, w.out + r * w.d, w.q + r * w.d, c.dq, b, h, t + r, w.d);
    }
    product({w.v, 1, w.m, w.k, w.d, w.state, w.d, true}, M, w.d, n, WHOLE, ahead);
    for (i64 r = 0; r < n; r++) add_row(w.sums, w.k + r * w.d, 1.0f, w.d);
  }
  // Last to first: R turned, (M, D), beside R.
  spread(c.grad_memory + at * D * M, D, M, w.other, w.d);
  spread(c.grad_keys + at * D, 1, D, w.sums, 1);
  for (i64 t = (c.length - 1) / C * C; t >= 0; t -= C) {
    const i64 n = least(C, c.length - t);
    turn(w.other, w.d, w.m, w.state);
    derivatives_of_chunk(c, w, b, h, t, n);
    Ahead ahead = next_chunk(c, b, h, t - C);
    turn(w.k, padded(n), w.d, w.turned);
    product({w.q, w.d, 1, w.turned, padded(n), w.pairs, C, false}, n, padded(n), D, PART, ahead);
    lower(w.pairs, n, nullptr);
    product({w.k, w.d, 1, w.other, w.m, w.out, w.m, false}, n, w.m, D, WHOLE, ahead);
    product({w.pairs, 1, C, w.g, w.m, w.out, w.m, true}, n, w.m, n, UPPER, ahead);
    for (i64 r = 0; r < n; r++)
      memcpy(c.dv + ((b * c.length + t + r) * c.heads + h) * M, w.out + r * w.m, M * sizeof(float));
    turn(w.v, padded(n), w.m, w.turned);
    product({w.g, w.m, 1, w.turned, padded(n), w.more, C, false}, n, padded(n), M, PART, ahead);
    lower(w.more, n, w.h);
    product({w.v, w.m, 1, w.state, w.d, w.out, w.d, false}, n, w.d, M, WHOLE, ahead);
    product({w.more, 1, C, w.q, w.d, w.out, w.d, true}, n, w.d, n, UPPER, ahead);
    for (i64 r = 0; r < n; r++) {
      add_row(w.out + r * w.d, w.sums, 1.0f, w.d);
      write_row(c, w.out + r * w.d, w.k + r * w.d, c.dk, b, h, t + r, w.d);
    }
    product({w.q, 1, w.d, w.g, w.m, w.other, w.m, true}, D, w.m, n, WHOLE, ahead);
    for (i64 r = 0; r < n; r++) add_row(w.sums, w.q + r * w.d, w.h[r], w.d);
  }
  gather(w.other, D, M, c.dmemory + at * D * M);
  gather(w.sums, 1, D, c.dkeys + at * D);
}

int heads(const Call& c, void (*one)(const Call&, i64, i64, float*)) {
  const i64 size = Room::size(padded(c.features), padded(c.values)) / 16 * 16 + 16;
  float* memory = c.scratch((size_t)(c.threads * size));
  if (!memory) return 2;
#pragma omp parallel for num_threads((int)c.threads) schedule(static) if (c.threads > 1)
  for (i64 t = 0; t < c.batch * c.heads; t++) one(c, t / c.heads, t % c.heads, memory + THREAD * size);
  return 0;
}

}  // namespace

#define NAMED_(PART, NAME) PART##_##NAME
#define NAMED(PART, NAME) NAMED_(PART, NAME)
int NAMED(attention_forward, INSTRUCTIONS)(const Call& c) { return heads(c, forward_head); }
int NAMED(attention_backward, INSTRUCTIONS)(const Call& c) { return heads(c, backward_head); }
