// One position of every sample through all layers, with one instruction set:
//   x += out(attention(projections(norm(x)))),  x += down(activation(up(norm(x)))),  then norm and head.
// Few samples: the rows of each matrix are split among the threads, which meet four times a layer. Many: each thread
// takes samples of its own and none waits. Weights are read where the parameters lie: a change of one is seen at once.
#include "call.h"
#include "../lanes.h"
namespace {

constexpr i64 W = LANES;
constexpr float EPSILON = 1e-6f;
constexpr i64 TOGETHER = 8;  // samples below which rows are split
constexpr i64 PARALLEL_WORK = 1 << 19;  // multiply-adds of a layer from which threads pay
// Weights and keys come from memory that is far away: tiles and positions fetched ahead (1.2 to 1.9 times faster).
constexpr int AHEAD = 3, ROWS_AHEAD = 32;
constexpr int MOST = LANES == 16 ? 6 : 3;  // samples of a tile

inline i64 padded(i64 n) { return (n + 15) / 16 * 16; }
inline i64 least(i64 a, i64 b) { return a < b ? a : b; }

// {sum of a, of b, of c, of d}
inline four sums(vec a, vec b, vec c, vec d) {
#if LANES == 16
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31)
#define FRONT(x, y) __builtin_shufflevector(x, y, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
#define BACK(x, y) __builtin_shufflevector(x, y, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#elif LANES == 8
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15)
#define FRONT(x, y) __builtin_shufflevector(x, y, 0, 1, 8, 9, 4, 5, 12, 13)
#define BACK(x, y) __builtin_shufflevector(x, y, 2, 3, 10, 11, 6, 7, 14, 15)
#else
#define LOW(x, y) __builtin_shufflevector(x, y, 0, 4, 1, 5)
#define HIGH(x, y) __builtin_shufflevector(x, y, 2, 6, 3, 7)
#define FRONT(x, y) __builtin_shufflevector(x, y, 0, 1, 4, 5)
#define BACK(x, y) __builtin_shufflevector(x, y, 2, 3, 6, 7)
#endif
  const vec p = LOW(a, b) + HIGH(a, b), q = LOW(c, d) + HIGH(c, d);
  const vec s = FRONT(p, q) + BACK(p, q);
#undef LOW
#undef HIGH
#undef FRONT
#undef BACK
  const four* quarter = (const four*)&s;
  four t = quarter[0];
  for (int e = 1; e < LANES / 4; e++) t += quarter[e];
  return t;
}

inline float total(vec v) { return sums(v, vec{}, vec{}, vec{})[0]; }

// out[s][r] (+)= weight[r] . x[s] + bias[r] for samples s and rows r.
struct Product {
  Matrix matrix;
  i64 columns;
  const float* x; i64 x_stride;
  float* out; i64 out_stride;
  bool add;
};

template <int R, int N> inline void tile(const Product& p, i64 r, i64 s) {
  vec acc[R][N] = {};
  const float *w = p.matrix.weight + r * p.columns, *x = p.x + s * p.x_stride;
  auto part = [&](i64 k, i64 n) __attribute__((always_inline)) {
    vec right[N];
#pragma GCC unroll 6
    for (int j = 0; j < N; j++) right[j] = load(x + j * p.x_stride + k, n);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const vec left = load(w + i * p.columns + k, n);
      __builtin_prefetch(w + (AHEAD * R + i) * p.columns + k, 0, 2);
#pragma GCC unroll 6
      for (int j = 0; j < N; j++) acc[i][j] += left * right[j];
    }
  };
  i64 k = 0;
  for (; k + W <= p.columns; k += W) part(k, W);
  if (k < p.columns) part(k, p.columns - k);
#pragma GCC unroll 6
  for (int j = 0; j < N; j++) {
    float* out = p.out + (s + j) * p.out_stride + r;
    if constexpr (R == 1) {
      const float v = total(acc[0][j]) + (p.matrix.bias ? p.matrix.bias[r] : 0.0f);
      *out = p.add ? *out + v : v;
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < R; i += 4) {
        four v = sums(acc[i][j], acc[i + 1][j], acc[i + 2][j], acc[i + 3][j]);
        if (p.matrix.bias) v += *(const four*)(p.matrix.bias + r + i);
        if (p.add) v += *(const four*)(out + i);
        *(four*)(out + i) = v;
      }
    }
  }
}

template <int R> inline void across(const Product& p, i64 r, i64 samples) {
  const i64 groups = (samples + MOST - 1) / MOST;
  for (i64 g = 0; g < groups; g++) {
    const i64 from = samples * g / groups, n = samples * (g + 1) / groups - from;
    switch (n) {
#if LANES == 16
      case 6: tile<R, 6>(p, r, from); break;
      case 5: tile<R, 5>(p, r, from); break;
      case 4: tile<R, 4>(p, r, from); break;
#endif
      case 3: tile<R, 3>(p, r, from); break;
      case 2: tile<R, 2>(p, r, from); break;
      default: tile<R, 1>(p, r, from);
    }
  }
}

void product(const Product& p, i64 from, i64 to, i64 samples) {
  i64 r = from;
  if (samples == 1)
    for (; r + 8 <= to; r += 8) tile<8, 1>(p, r, 0);
  for (; r + 4 <= to; r += 4) across<4>(p, r, samples);
  for (; r < to; r++) across<1>(p, r, samples);
}

void normed(const Norm& norm, const float* x, i64 n, float* out) {
  if (norm.kind == NO_NORM) {
    memcpy(out, x, n * sizeof(float));
    return;
  }
  float mean = 0.0f;
  if (norm.kind == LAYER_NORM) {
    vec s = vec{};
    for (i64 e = 0; e < n; e += W) s += load(x + e, n - e);
    mean = total(s) / n;
  }
  vec squares = vec{};
  for (i64 e = 0; e < n; e += W) {
    vec d = load(x + e, n - e) - mean;
    if (n - e < W) {  // what lies past the end counts nothing
      float rest[LANES];
      store(rest, d);
      d = load(rest, n - e);
    }
    squares += d * d;
  }
  const float by = 1.0f / sqrtf(total(squares) / n + (float)norm.eps);
  for (i64 e = 0; e < n; e += W) {
    vec y = (load(x + e, n - e) - mean) * by;
    if (norm.weight) y *= load(norm.weight + e, n - e);
    if (norm.bias) y += load(norm.bias + e, n - e);
    store(out + e, y, n - e);
  }
}

inline vec absolute(vec x) { return x < 0.0f ? -x : x; }

inline vec sigmoid(vec x) {
  const vec e = exponential(-absolute(x));
  return (x < 0.0f ? e : all(1.0f)) / (1.0f + e);
}

// The error function within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline vec error_function(vec x) {
  const vec a = absolute(x), t = 1.0f / (1.0f + 0.3275911f * a);
  vec p = all(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec y = 1.0f - p * t * exponential(-a * a);
  return x < 0.0f ? -y : y;
}

inline vec activated(vec x, i64 activation) {
  switch (activation) {
    case GELU: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case GELU_TANH: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    case SILU: return x * sigmoid(x);
    default: return x > 0.0f ? x : vec{};
  }
}

void activate(float* x, i64 n, i64 activation) {
  for (i64 e = 0; e < n; e += W) store(x + e, activated(load(x + e, n - e), activation), n - e);
}

inline vec mapped(vec x, i64 map) {
  if (map == RELU) return x > 0.0f ? x : vec{};
  return map == ELU ? (x > 0.0f ? x + 1.0f : exponential(x < 0.0f ? x : vec{})) : x;
}

void unit(float* x, i64 n) {
  float s = 0.0f;
  for (i64 e = 0; e < n; e++) s += x[e] * x[e];
  const float norm = sqrtf(s), by = 1.0f / (norm > 1e-12f ? norm : 1e-12f);
  for (i64 e = 0; e < n; e++) x[e] *= by;
}

// Gates near one: the sixteenth root of a sigmoid.
inline float slow(float x) { return expf((fminf(x, 0.0f) - log1pf(expf(-fabsf(x)))) / 16.0f); }

// C vectors of columns of S <- decay S + k (rate (v - held))^T, and q^T S: the state is read and written once; the delta
// rule reads it once more before.
struct Update {
  bool delta;
  float *state, rate, by;
  const float *q, *k, *v, *decay;
  i64 n;
  float* out;
};

template <int C> inline void update(const Update& u, i64 m, i64 left) {
  vec add[C], found[C] = {};
  for (int c = 0; c < C; c++) add[c] = load(u.v + m + c * W, left);
  if (u.delta) {
    vec held[C] = {};
    for (i64 d = 0; d < u.n; d++) {
      const float key = u.decay ? u.decay[d] * u.k[d] : u.k[d];
      for (int c = 0; c < C; c++) held[c] += key * load(u.state + d * u.n + m + c * W, left);
    }
    for (int c = 0; c < C; c++) add[c] = u.rate * (add[c] - held[c]);
  }
  for (i64 d = 0; d < u.n; d++) {
    float* at = u.state + d * u.n + m;
    const float kept = u.decay ? u.decay[d] : 1.0f;
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      const vec s = kept * load(at + c * W, left) + u.k[d] * add[c];
      store(at + c * W, s, left);
      found[c] += u.q[d] * s;
    }
  }
  for (int c = 0; c < C; c++) store(u.out + m + c * W, found[c] * u.by, left);
}

void recur(const Layer& l, float* state, float* sum, float* q, float* k, const float* v, const float* decay,
           float rate, i64 n, float* out) {
  if (l.delta) {
    activate(q, n, SILU);
    activate(k, n, SILU);
    unit(q, n);
    unit(k, n);
  }
  for (i64 e = 0; e < n; e += W) {
    store(q + e, mapped(load(q + e, n - e), l.map), n - e);
    store(k + e, mapped(load(k + e, n - e), l.map), n - e);
  }
  float below = 0.0f;
  for (i64 d = 0; d < n; d++) {
    sum[d] = (decay ? decay[d] * sum[d] : sum[d]) + k[d];
    below += q[d] * sum[d];
  }
  const Update u = {(bool)l.delta, state, rate, l.normalize ? 1.0f / (below + EPSILON) : 1.0f, q, k, v, decay, n, out};
  i64 m = 0;
  for (; m + 4 * W <= n; m += 4 * W) update<4>(u, m, W);
  for (; m + 2 * W <= n; m += 2 * W) update<2>(u, m, W);
  for (; m + W <= n; m += W) update<1>(u, m, W);
  if (m < n) update<1>(u, m, n - m);
}

// R positions at a time have sums of their own, so that no sum waits for the one before.
template <int R, int C> inline void weigh(const float* weights, const float* values, i64 count, i64 n, float by,
                                          i64 left, float* out) {
  vec acc[R][C] = {};
  i64 t = 0;
  for (; t + R <= count; t += R)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        acc[r][c] += weights[t + r] * load(values + (t + r) * n + c * W, left);
        __builtin_prefetch(values + (t + r + ROWS_AHEAD) * n + c * W, 0, 2);
      }
  for (; t < count; t++)
    for (int c = 0; c < C; c++) acc[0][c] += weights[t] * load(values + t * n + c * W, left);
  for (int c = 0; c < C; c++) {
    for (int r = 1; r < R; r++) acc[0][c] += acc[r][c];
    store(out + c * W, acc[0][c] * by, left);
  }
}

// softmax(q . keys / sqrt(size)) values over `count` positions; scores has room for them and a vector more.
void attend(const float* q, const float* keys, const float* values, i64 count, i64 n, float* scores, float* out) {
  const float scale = 1.0f / sqrtf((float)n);
  i64 t = 0;
  for (; t + 4 <= count; t += 4) {
    vec acc[4] = {};
    const float* k = keys + t * n;
    auto part = [&](i64 e, i64 left) __attribute__((always_inline)) {
      const vec right = load(q + e, left);
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        acc[r] += right * load(k + r * n + e, left);
        __builtin_prefetch(k + (r + ROWS_AHEAD) * n + e, 0, 2);
      }
    };
    i64 e = 0;
    for (; e + W <= n; e += W) part(e, W);
    if (e < n) part(e, n - e);
    *(four*)(scores + t) = sums(acc[0], acc[1], acc[2], acc[3]) * scale;
  }
  for (; t < count; t++) {
    vec acc = vec{};
    for (i64 e = 0; e < n; e += W) acc += load(q + e, n - e) * load(keys + t * n + e, n - e);
    scores[t] = total(acc) * scale;
  }
  vec best = all(scores[0]);
  for (t = 0; t + W <= count; t += W) {
    const vec s = load(scores + t);
    best = s > best ? s : best;
  }
  float most = scores[0];
  for (i64 e = 0; e < W; e++) most = fmaxf(most, best[e]);
  for (; t < count; t++) most = fmaxf(most, scores[t]);
  vec weights = vec{};
  for (t = 0; t < count; t += W) {
    store(scores + t, exponential(load(scores + t, count - t) - most));
    weights += load(scores + t, count - t);
  }
  const float by = 1.0f / total(weights);
  i64 m = 0;
  for (; m + 4 * W <= n; m += 4 * W) weigh<2, 4>(scores, values + m, count, n, by, W, out + m);
  for (; m + 2 * W <= n; m += 2 * W) weigh<4, 2>(scores, values + m, count, n, by, W, out + m);
  for (; m + W <= n; m += W) weigh<4, 1>(scores, values + m, count, n, by, W, out + m);
  if (m < n) weigh<4, 1>(scores, values + m, count, n, by, n - m, out + m);
}

// What the threads share, and what each has for itself, as offsets into scratch memory.
struct Plan {
  i64 width, inner, heads, scores, x, attended, hidden, own, each;
  explicit Plan(const Step& s) : width(padded(s.width)), inner(padded(s.inner)), heads(padded(s.heads)), scores(0) {
    for (i64 i = 0; i < s.layers; i++)
      if (s.layer[i].attention == SOFTMAX && s.layer[i].filled + 1 > scores) scores = s.layer[i].filled + 1;
    scores = padded(scores) + 2 * 16;
    x = 0;
    attended = x + s.batch * width;
    hidden = attended + s.batch * width;
    own = hidden + s.batch * inner;
    // normed, projections, gates, rates for every sample; decay of a head; scores
    each = s.batch * (width + padded(3 * s.width) + width + heads) + width + scores;
  }
};

inline i64 room(const Step& s) {
  const Plan p(s);
  return p.own + s.threads * p.each;
}

struct Team {
  i64 part, parts, from, samples;  // this thread's share of the rows, its samples
};

inline void meet(const Team& t) {
  if (t.parts > 1) {
#pragma omp barrier
  }
}

void attention(const Step& s, const Layer& l, const Plan& p, const Team& t) {
  const i64 n = s.width / s.heads, first = s.heads * t.part / t.parts, last = s.heads * (t.part + 1) / t.parts;
  const i64 wide = padded(3 * s.width);
  float* normal = s.memory + p.own + THREAD * p.each;
  float *rows = normal + t.samples * p.width, *gates = rows + t.samples * wide, *rates = gates + t.samples * p.width;
  float *decay = rates + t.samples * p.heads, *scores = decay + p.width;
  for (i64 b = 0; b < t.samples; b++)
    normed(l.before, s.memory + p.x + (t.from + b) * p.width, s.width, normal + b * p.width);
  for (i64 part = 0; part < 3; part++)
    product({l.projections, s.width, normal, p.width, rows, wide, false}, part * s.width + first * n,
            part * s.width + last * n, t.samples);
  const i64 each = l.decay == BY_FEATURE ? n : 1;
  if (l.decay) product({l.gate, s.width, normal, p.width, gates, p.width, false}, first * each, last * each, t.samples);
  if (l.delta) product({l.rate, s.width, normal, p.width, rates, p.heads, false}, first, last, t.samples);
  for (i64 b = 0; b < t.samples; b++)
    for (i64 h = first; h < last; h++) {
      float *q = rows + b * wide + h * n, *k = q + s.width, *v = k + s.width;
      float* out = s.memory + p.attended + (t.from + b) * p.width + h * n;
      if (l.attention == SOFTMAX) {
        const i64 at = (t.from + b) * l.batch_stride + h * l.head_stride;
        memcpy(l.keys + at + l.filled * n, k, n * sizeof(float));
        memcpy(l.values + at + l.filled * n, v, n * sizeof(float));
        i64 start = l.starts ? l.starts[t.from + b] : 0;
        if (l.window && l.filled + 1 - l.window > start) start = l.filled + 1 - l.window;
        start = start < 0 ? 0 : least(start, l.filled);  // the own position is always seen
        attend(q, l.keys + at + start * n, l.values + at + start * n, l.filled + 1 - start, n, scores, out);
        continue;
      }
      const i64 at = (t.from + b) * s.heads + h;
      const bool decays = l.decay || l.retention;
      if (decays)
        for (i64 e = 0; e < n; e++)
          decay[e] = l.decay == BY_FEATURE ? slow(gates[b * p.width + h * n + e])
                     : l.decay == BY_HEAD  ? (e ? decay[0] : slow(gates[b * p.width + h]))
                                           : l.retention[h];
      const float rate = l.delta ? 1.0f / (1.0f + expf(-rates[b * p.heads + h])) : 1.0f;
      recur(l, l.memory + at * n * n, l.keys + at * n, q, k, v, decays ? decay : nullptr, rate, n, out);
      normed(l.inside, out, n, out);
    }
}

void run(const Step& s, const Plan& p, const Team& t) {
  auto share = [&](i64 rows, i64 part) {  // whole groups of eight rows
    return least(rows, (rows + 7) / 8 * part / t.parts * 8);
  };
  float* normal = s.memory + p.own + THREAD * p.each;
  float *x = s.memory + p.x + t.from * p.width, *attended = s.memory + p.attended + t.from * p.width;
  float* hidden = s.memory + p.hidden + t.from * p.inner;
  if (t.part == 0)
    for (i64 b = 0; b < t.samples; b++) memcpy(x + b * p.width, s.x + (t.from + b) * s.width, s.width * sizeof(float));
  meet(t);
  const i64 from = share(s.width, t.part), to = share(s.width, t.part + 1);
  const i64 low = share(s.inner, t.part), high = share(s.inner, t.part + 1);
  for (i64 i = 0; i < s.layers; i++) {
    const Layer& l = s.layer[i];
    attention(s, l, p, t);
    meet(t);
    product({l.out, s.width, attended, p.width, x, p.width, true}, from, to, t.samples);
    meet(t);
    for (i64 b = 0; b < t.samples; b++) normed(l.between, x + b * p.width, s.width, normal + b * p.width);
    product({l.up, s.width, normal, p.width, hidden, p.inner, false}, low, high, t.samples);
    for (i64 b = 0; b < t.samples; b++) activate(hidden + b * p.inner + low, high - low, s.activation);
    meet(t);
    product({l.down, s.inner, hidden, p.inner, x, p.width, true}, from, to, t.samples);
    meet(t);
  }
  for (i64 b = 0; b < t.samples; b++) normed(s.last, x + b * p.width, s.width, normal + b * p.width);
  float* out = s.out + t.from * s.outputs;
  if (s.head.weight)
    product({s.head, s.width, normal, p.width, out, s.outputs, false}, share(s.outputs, t.part),
            share(s.outputs, t.part + 1), t.samples);
  else if (t.part == 0)
    for (i64 b = 0; b < t.samples; b++) memcpy(out + b * s.width, normal + b * p.width, s.width * sizeof(float));
}

inline void step(const Step& s) {
  const Plan p(s);
  const i64 work = s.batch * s.width * (4 * s.width + 2 * s.inner);
  const bool apart = s.batch >= TOGETHER;
  const i64 threads = work < PARALLEL_WORK ? 1 : apart ? least(s.threads, s.batch) : s.threads;
  if (threads == 1) return run(s, p, {0, 1, 0, s.batch});
#pragma omp parallel num_threads(threads)
  {
    // A runtime may give fewer threads than asked for.
#ifdef _OPENMP
    const i64 given = omp_get_num_threads();
#else
    const i64 given = 1;
#endif
    const i64 from = s.batch * THREAD / given;
    run(s, p, apart ? Team{0, 1, from, s.batch * (THREAD + 1) / given - from} : Team{THREAD, given, 0, s.batch});
  }
}

}  // namespace

#define NAME(set) decode_step_##set
#define NAMED(set) NAME(set)
void NAMED(INSTRUCTIONS)(const Step& s) { step(s); }
