// Least squares on the support of one sample by Cholesky; included once for each instruction set.
// VECTOR: bytes of a register; TILE: registers of each of the four rows that are made together.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef int64_t i64;

#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)

namespace {

// Rows of the triangle begin at multiples of so many entries, so that whole registers are read and written.
template <typename T>
constexpr i64 lanes() {
  return VECTOR / sizeof(T);
}

// Numbers that solve_one works on for a support of k entries.
template <typename T>
i64 scratch(i64 k) {
  const i64 width = (k + lanes<T>()) / lanes<T>() * lanes<T>();
  return (k + 1) * width;
}

// Takes the p rows above off R rows from column `first` on, V registers wide; above and rows are `width` apart.
template <typename T, int R, int V>
void take_off(i64 p, i64 width, i64 first, const T* above, i64 at, T* rows) {
  typedef T Lanes __attribute__((vector_size(VECTOR), aligned(alignof(T)), may_alias));
  Lanes sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[r][v] = *(const Lanes*)(rows + r * width + first + v * lanes<T>());
  for (i64 q = 0; q < p; q++) {
    const T* row = above + q * width;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const Lanes part = *(const Lanes*)(row + first + v * lanes<T>());
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[r][v] -= row[at + r] * part;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) *(Lanes*)(rows + r * width + first + v * lanes<T>()) = sum[r][v];
}

// Makes rows i ... i + R - 1 of the triangle u from those of the matrix that lie in their place. What lies before the
// diagonal is rounding and is never used. Returns whether the pivots are above `least`.
template <typename T, int R>
bool eliminate(i64 i, i64 width, T* u, T least) {
  T* rows = u + i * width;
  const i64 start = i / lanes<T>() * lanes<T>();
  i64 first = start;
  for (; first + TILE * lanes<T>() <= width; first += TILE * lanes<T>())
    take_off<T, R, TILE>(i, width, first, u, i, rows);
  for (; first < width; first += lanes<T>()) take_off<T, R, 1>(i, width, first, u, i, rows);
  for (int r = 0; r < R; r++) {
    T* __restrict row = rows + r * width;
    for (int q = 0; q < r; q++) {
      const T* __restrict other = rows + q * width;
      const T f = other[i + r];
      for (i64 t = start; t < width; t++) row[t] -= f * other[t];
    }
    const T pivot = row[i + r];
    if (!(pivot > least)) return false;
    const T scale = 1 / sqrt(pivot);
    for (i64 t = start; t < width; t++) row[t] *= scale;
  }
  return true;
}

// Solves G[s, s] z = c[s] and writes z to x[s]; rows of G are `stride` apart, s has k indices below its size, u holds
// scratch(k) numbers. Returns whether all pivots were above rounding.
template <typename T>
bool solve_one(i64 k, const T* gram, i64 stride, const i64* s, const T* c, T* x, T* u, T rounding) {
  // the right-hand side is one more column: elimination solves for it too
  const i64 width = (k + lanes<T>()) / lanes<T>() * lanes<T>();
  T largest = 0;
  for (i64 i = 0; i < k; i++) {
    const T* g = gram + s[i] * stride;
    T* row = u + i * width;
    for (i64 j = i / lanes<T>() * lanes<T>(); j < k; j++) row[j] = g[s[j]];
    row[k] = c[s[i]];
    for (i64 j = k + 1; j < width; j++) row[j] = 0;
    if (row[i] > largest) largest = row[i];
  }
  i64 i = 0;
  for (; i + 4 <= k; i += 4)
    if (!eliminate<T, 4>(i, width, u, rounding * largest)) return false;
  for (; i < k; i++)
    if (!eliminate<T, 1>(i, width, u, rounding * largest)) return false;
  T* __restrict z = u + k * width;
  for (i64 t = 0; t < width; t++) z[t] = 0;
  for (i64 p = k - 1; p >= 0; p--) {
    const T* __restrict row = u + p * width;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 t = p / lanes<T>() * lanes<T>(); t < width; t++) sum += row[t] * z[t];
    z[p] = (row[k] - sum) / row[p];
  }
  for (i64 p = 0; p < k; p++) x[s[p]] = z[p];
  return true;
}

}  // namespace
