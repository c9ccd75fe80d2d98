// Rows of matrices times samples, norms and activations, on vectors of LANES floats.
#pragma once
#include "call.h"
#include "../lanes.h"
namespace {

constexpr i64 W = LANES;
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

}  // namespace
