// What one head does: linear attention and its family, softmax over kept keys, both with one denominator.
#pragma once
#include "rows.h"
namespace {

constexpr float EPSILON = 1e-6f;

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
  i64 rows, n;
  float* out;
};

template <int C> inline void update(const Update& u, i64 m, i64 left) {
  vec add[C], found[C] = {};
  for (int c = 0; c < C; c++) add[c] = load(u.v + m + c * W, left);
  if (u.delta) {
    vec held[C] = {};
    for (i64 d = 0; d < u.rows; d++) {
      const float key = u.decay ? u.decay[d] * u.k[d] : u.k[d];
      for (int c = 0; c < C; c++) held[c] += key * load(u.state + d * u.n + m + c * W, left);
    }
    for (int c = 0; c < C; c++) add[c] = u.rate * (add[c] - held[c]);
  }
  for (i64 d = 0; d < u.rows; d++) {
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

void update(const Update& u) {
  i64 m = 0;
  for (; m + 4 * W <= u.n; m += 4 * W) update<4>(u, m, W);
  for (; m + 2 * W <= u.n; m += 2 * W) update<2>(u, m, W);
  for (; m + W <= u.n; m += W) update<1>(u, m, W);
  if (m < u.n) update<1>(u, m, u.n - m);
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
  const Update u = {(bool)l.delta, state, rate, l.normalize ? 1.0f / (below + EPSILON) : 1.0f, q, k, v, decay,
                    n, n, out};
  update(u);
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

// sum of weights[t] values[t] by, over `count` rows of n.
void combine(const float* weights, const float* values, i64 count, i64 n, float by, float* out) {
  i64 m = 0;
  for (; m + 4 * W <= n; m += 4 * W) weigh<2, 4>(weights, values + m, count, n, by, W, out + m);
  for (; m + 2 * W <= n; m += 2 * W) weigh<4, 2>(weights, values + m, count, n, by, W, out + m);
  for (; m + W <= n; m += W) weigh<4, 1>(weights, values + m, count, n, by, W, out + m);
  if (m < n) weigh<4, 1>(weights, values + m, count, n, by, n - m, out + m);
}

// scores[t] = q . keys[t] / sqrt(size).
void score(const float* q, const float* keys, i64 count, i64 n, float* scores) {
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
}

// scores[t] <- e^(scores[t] - the largest); their sum.
float exponentials(float* scores, i64 count) {
  vec best = all(scores[0]);
  i64 t = 0;
  for (; t + W <= count; t += W) {
    const vec s = load(scores + t);
    best = s > best ? s : best;
  }
  float most = scores[0];
  for (i64 e = 0; e < W; e++) most = fmaxf(most, best[e]);
  for (; t < count; t++) most = fmaxf(most, scores[t]);
  vec weights = vec{};
  for (t = 0; t < count; t += W) {
    store(scores + t, exponential(load(scores + t, count - t) - most), count - t);
    weights += load(scores + t, count - t);
  }
  return total(weights);
}

// softmax(q . keys / sqrt(size)) values over `count` positions; scores has room for them.
void attend(const float* q, const float* keys, const float* values, i64 count, i64 n, float* scores, float* out) {
  score(q, keys, count, n, scores);
  const float by = 1.0f / exponentials(scores, count);
  combine(scores, values, count, n, by, out);
}

// Features of one head's x (n); `columns` of them.
void features(i64 map, const Matrix& m, i64 h, const float* x, i64 n, i64 columns, float* out) {
  if (map < T2R) {
    for (i64 e = 0; e < n; e += W) store(out + e, mapped(load(x + e, n - e), map), n - e);
    return;
  }
  const i64 inner = map == T2R ? columns : n;
  combine(x, m.weight + h * n * inner, n, inner, 1.0f, out);
  if (map == T2R) {
    for (i64 e = 0; e < inner; e += W) {
      vec y = load(out + e, inner - e);
      if (m.bias) y += load(m.bias + h * inner + e, inner - e);
      store(out + e, y < 0.0f ? vec{} : y, inner - e);
    }
    return;
  }
  for (i64 e = 0; e < n; e += W) store(out + n + e, -load(out + e, n - e), n - e);
  for (i64 part = 0; part < 2; part++) {
    float* y = out + part * n;
    const float by = 1.0f / exponentials(y, n);
    for (i64 e = 0; e < n; e++) y[e] *= by;
  }
}

// Softmax over the ring of the last `window` positions, linear attention to those before them, one denominator. The key
// that leaves the ring enters the state. `own` has room for features of q and k, an output and the scores.
void hybrid(const Layer& l, i64 h, i64 sample, i64 at, const float* q, const float* k, const float* v, i64 n,
            float* own, float* out) {
  const i64 w = l.window, slot = l.filled;
  float *fq = own, *fk = fq + padded(l.features), *near = fk + padded(l.features), *scores = near + padded(n);
  float *keys = l.near_keys + at * w * n, *values = l.near_values + at * w * n, *sum = l.keys + at * l.features;
  const unsigned char* real = l.real + sample * w;
  features(l.map, l.query_map, h, q, n, l.features, fq);
  if (!w || real[slot]) features(l.map, l.key_map, h, w ? keys + slot * n : k, n, l.features, fk);
  else memset(fk, 0, l.features * sizeof(float));
  float below = 0.0f;
  for (i64 d = 0; d < l.features; d++) {
    sum[d] += fk[d];
    below += fq[d] * sum[d];
  }
  const float gain = w ? expf(l.balance[h]) : 1.0f;
  float weights = 0.0f;
  if (w) {
    memcpy(keys + slot * n, k, n * sizeof(float));
    score(q, keys, w, n, scores);
    for (i64 t = 0; t < w; t++)
      if (!real[t] && t != slot) scores[t] = -INFINITY;
    weights = exponentials(scores, w);
    for (i64 t = 0; t < w; t++)
      if (!real[t] && t != slot) scores[t] = 0.0f;  // a number too small to matter, but slow
  }
  const float by = 1.0f / (weights + gain * below + EPSILON);
  float* state = l.memory + at * l.features * n;
  update({false, state, 1.0f, gain * by, fq, fk, w ? values + slot * n : v, nullptr, l.features, n, out});
  if (!w) return;
  memcpy(values + slot * n, v, n * sizeof(float));
  combine(scores, values, w, n, by, near);
  for (i64 e = 0; e < n; e++) out[e] += near[e];
}

// The halves of x as real and imaginary parts, turned.
void rotate(float* x, i64 n, const float* cosines, const float* sines) {
  const i64 half = n / 2;
  for (i64 e = 0; e < half; e++) {
    const float a = x[e], b = x[e + half];
    x[e] = a * cosines[e] - b * sines[e];
    x[e + half] = b * cosines[e + half] + a * sines[e + half];
  }
}

}  // namespace
