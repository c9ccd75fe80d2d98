// Least squares on a support of each sample by Cholesky; included once for each instruction set.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef int64_t i64;

#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)

namespace {

// Pivots whose rows are subtracted from the rest together.
constexpr i64 PANEL = 4;

// Solves G[s, s] z = c[s] and writes z to x[s]. u holds k * k numbers and y holds k; s has k indices below n.
// Returns whether all pivots were above rounding.
template <typename T>
bool solve_one(i64 n, i64 k, const T* gram, const i64* s, const T* c, T* x, T* u, T* y, T rounding) {
  T largest = 0;
  for (i64 i = 0; i < k; i++) {
    const T* g = gram + s[i] * n;
    T* row = u + i * k;
    for (i64 j = i; j < k; j++) row[j] = g[s[j]];
    if (row[i] > largest) largest = row[i];
    y[i] = c[s[i]];
  }
  for (i64 first = 0; first < k; first += PANEL) {
    const i64 last = first + PANEL < k ? first + PANEL : k;
    for (i64 p = first; p < last; p++) {
      T* row = u + p * k;
      for (i64 q = first; q < p; q++) {
        const T* above = u + q * k;
        const T f = above[p];
        for (i64 t = p; t < k; t++) row[t] -= f * above[t];
        y[p] -= f * y[q];
      }
      if (!(row[p] > rounding * largest)) return false;
      const T scale = 1 / sqrt(row[p]);
      for (i64 t = p; t < k; t++) row[t] *= scale;
      y[p] *= scale;
    }
    if (last - first < PANEL) break;
    const T *a = u + first * k, *b = a + k, *d = b + k, *e = d + k;
    for (i64 i = last; i < k; i++) {
      T* row = u + i * k;
      const T fa = a[i], fb = b[i], fd = d[i], fe = e[i];
#pragma GCC ivdep
      for (i64 t = i; t < k; t++) row[t] -= (fa * a[t] + fb * b[t]) + (fd * d[t] + fe * e[t]);
      y[i] -= (fa * y[first] + fb * y[first + 1]) + (fd * y[first + 2] + fe * y[first + 3]);
    }
  }
  for (i64 p = k - 1; p >= 0; p--) {
    const T* row = u + p * k;
    T sum = y[p];
#pragma omp simd reduction(- : sum)
    for (i64 t = p + 1; t < k; t++) sum -= row[t] * y[t];
    y[p] = sum / row[p];
  }
  for (i64 i = 0; i < k; i++) x[s[i]] = y[i];
  return true;
}

template <typename T>
int solve_all(i64 batch, i64 n, i64 k, const T* gram, const i64* support, const T* right, T* x, unsigned char* failed,
              T rounding, int threads) {
  int memory = 0;
#pragma omp parallel num_threads(threads) reduction(max : memory)
  {
    T* u = (T*)malloc(sizeof(T) * k * (k + 1));
    if (!u) memory = 1;
#pragma omp for schedule(static)
    for (i64 i = 0; i < batch; i++)
      if (u) failed[i] = !solve_one<T>(n, k, gram, support + i * k, right + i * n, x + i * n, u, u + k * k, rounding);
    free(u);
  }
  return memory;
}

}  // namespace

int JOIN(support_solve, INSTRUCTIONS)(int wide, i64 batch, i64 n, i64 k, const void* gram, const i64* support,
                                      const void* right, void* x, unsigned char* failed, double rounding,
                                      int threads) {
  if (wide)
    return solve_all<double>(batch, n, k, (const double*)gram, support, (const double*)right, (double*)x, failed,
                             rounding, threads);
  return solve_all<float>(batch, n, k, (const float*)gram, support, (const float*)right, (float*)x, failed,
                          (float)rounding, threads);
}
