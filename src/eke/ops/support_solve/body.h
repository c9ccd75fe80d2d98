// Least squares on a support of each sample; included once for each instruction set.
#include "cholesky.h"

namespace {

template <typename T>
int solve_all(i64 batch, i64 n, i64 k, const T* gram, const i64* support, const T* right, T* x, unsigned char* failed,
              T rounding, int threads) {
  int memory = 0;
#pragma omp parallel num_threads(threads) reduction(max : memory)
  {
    T* u = (T*)malloc(sizeof(T) * scratch<T>(k));
    if (!u) memory = 1;
#pragma omp for schedule(static)
    for (i64 i = 0; i < batch; i++)
      if (u) failed[i] = !solve_one<T>(k, gram, n, support + i * k, right + i * n, x + i * n, u, rounding);
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
