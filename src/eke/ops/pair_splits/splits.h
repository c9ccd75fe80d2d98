// Row pairs of rank one, level after level while they are in the cache; included once for each instruction set.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef int64_t i64;

// The whole call: `values` (many, rows, cols), `u[l]` (many * pieces before l, 2, pieces[l], rows / 2^(l+1)), `right`
// (many * all pieces, rows / 2^levels, cols / all pieces), row by row.
struct Splits {
  i64 many, rows, cols, levels;
  const i64* pieces;
  double* const* u;
  int threads;
};

#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)

namespace {

// Bytes of a group of rows that go through several levels at once; with what comes out of them they fit in the L2 cache.
constexpr i64 GROUP = 1 << 18;

// N numbers stand for one entry: 1 for real, 2 for complex ones.
template <int N> struct Gram { double p, w, re, im; };

template <int N> Gram<N> gram(const double* __restrict x, const double* __restrict y, i64 n) {
  double p = 0, w = 0, re = 0, im = 0;
  if constexpr (N == 1) {
#pragma omp simd reduction(+ : p, w, re)
    for (i64 e = 0; e < n; e++) p += x[e] * x[e], w += y[e] * y[e], re += x[e] * y[e];
  } else {
#pragma omp simd reduction(+ : p, w, re, im)
    for (i64 e = 0; e < n; e++) {
      double a = x[2 * e], b = x[2 * e + 1], c = y[2 * e], d = y[2 * e + 1];
      p += a * a + b * b, w += c * c + d * d, re += a * c + b * d, im += b * c - a * d;
    }
  }
  return Gram<N>{p, w, re, im};
}

// The leading eigenvector of [[p, q], [q*, w]]: sums of what has one sign, so nothing cancels.
template <int N> void leading(const Gram<N>& g, double* top, double* bottom) {
  double half = (g.p - g.w) / 2, size = N == 1 ? fabs(g.re) : hypot(g.re, g.im);
  double large = fabs(half) + hypot(half, size), norm = hypot(large, size);
  top[0] = bottom[0] = 0;
  if (N == 2) top[1] = bottom[1] = 0;
  if (norm == 0) {
    top[0] = 1;
    return;
  }
  double re = g.re / norm, im = g.im / norm;
  double *big = half >= 0 ? top : bottom, *cross = half >= 0 ? bottom : top;
  big[0] = large / norm;
  cross[0] = re;
  if (N == 2) cross[1] = half >= 0 ? -im : im;
}

// v = top* x + bottom* y
template <int N>
void project(const double* __restrict x, const double* __restrict y, i64 n, const double* top, const double* bottom,
             double* __restrict v) {
  if constexpr (N == 1) {
    double a = top[0], b = bottom[0];
#pragma omp simd
    for (i64 e = 0; e < n; e++) v[e] = a * x[e] + b * y[e];
  } else {
    double a = top[0], b = -top[1], c = bottom[0], d = -bottom[1];
#pragma omp simd
    for (i64 e = 0; e < n; e++) {
      double xr = x[2 * e], xi = x[2 * e + 1], yr = y[2 * e], yi = y[2 * e + 1];
      v[2 * e] = a * xr - b * xi + c * yr - d * yi;
      v[2 * e + 1] = a * xi + b * xr + c * yi + d * yr;
    }
  }
}

// What one matrix of a level is: number `at` of its level, `m` rows of `c` entries.
struct Part { i64 level, at, m, c; };

// `depth` levels for the rows k, k + step, ... of a matrix, step = m / 2^depth; `to` gets row k of each piece.
template <int N>
void group(const Splits& all, const Part& part, i64 depth, i64 k, const double* from, double* to, double* scratch) {
  i64 step = part.m >> depth, c = part.c, made = 1;
  double *next = scratch, *other = scratch + ((part.c * N) << (depth - 1));
  for (i64 l = 0; l < depth; l++) {
    i64 t = all.pieces[part.level + l], pairs = (i64)1 << (depth - 1 - l), wide = c / t, s = part.m >> (l + 1);
    bool last = l == depth - 1;
    for (i64 piece = 0; piece < made; piece++)
      for (i64 r = 0; r < pairs; r++) {
        const double* x = l ? from + (piece * 2 * pairs + r) * c * N : from + (r * step + k) * c * N;
        const double* y = x + (l ? pairs : pairs * step) * c * N;
        double* u = all.u[part.level + l] + (((part.at * made + piece) * 2 * t) * s + r * step + k) * N;
        for (i64 j = 0; j < t; j++) {
          double top[2], bottom[2];
          leading<N>(gram<N>(x + j * wide * N, y + j * wide * N, wide), top, bottom);
          for (int e = 0; e < N; e++) u[j * s * N + e] = top[e], u[(t + j) * s * N + e] = bottom[e];
          i64 place = piece * t + j;
          double* v = last ? to + (place * step + k) * wide * N : next + (place * pairs + r) * wide * N;
          project<N>(x + j * wide * N, y + j * wide * N, wide, top, bottom, v);
        }
      }
    from = next;
    double* free_now = other;
    other = next, next = free_now;
    made *= t, c = wide;
  }
}

// All levels from `part.level` on, as many at once as fit in the cache; 0, or 1 without memory.
template <int N> int descend(const Splits& all, const Part& part, const double* from, double* right, int threads) {
  i64 left = all.levels - part.level, depth = 1, made = 1;
  while (depth < left && ((part.c * N * (i64)sizeof(double)) << (depth + 1)) <= GROUP) depth++;
  for (i64 l = 0; l < depth; l++) made *= all.pieces[part.level + l];
  i64 step = part.m >> depth, size = (part.c * N) << (depth - 1);
  bool done = depth == left;
  double* kept = done ? right + part.at * step * part.c * N : (double*)malloc(step * part.c * N * sizeof(double));
  if (!kept) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    double* scratch = (double*)malloc(2 * size * sizeof(double));
    failed |= !scratch;
#pragma omp for
    for (i64 k = 0; k < step; k++)
      if (scratch) group<N>(all, part, depth, k, from, kept, scratch);
    free(scratch);
  }
  if (done) return failed;
  Part below = {part.level + depth, 0, step, part.c / made};
#pragma omp parallel for num_threads(threads) reduction(| : failed)
  for (i64 piece = 0; piece < made; piece++) {
    Part one = below;
    one.at = part.at * made + piece;
    if (!failed) failed |= descend<N>(all, one, kept + piece * step * below.c * N, right, 1);
  }
  free(kept);
  return failed;
}

}  // namespace

int JOIN(pair_splits, INSTRUCTIONS)(const Splits& all, bool complex, const double* values, double* right) {
  int failed = 0;
  for (i64 at = 0; at < all.many && !failed; at++) {
    Part part = {0, at, all.rows, all.cols};
    const double* from = values + at * all.rows * all.cols * (complex ? 2 : 1);
    failed = complex ? descend<2>(all, part, from, right, all.threads) : descend<1>(all, part, from, right, all.threads);
  }
  return failed;
}
