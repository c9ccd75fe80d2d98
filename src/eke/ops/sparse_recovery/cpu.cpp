// Sparse solutions on the CPU, behind a plain C interface.
#define INSTRUCTIONS portable
#define VECTOR 16
#define TILE 2
#define BLOCK 8
#include "../machine.h"
#include "body.h"

#define ARGUMENTS                                                                                            \
  int wide, const i64 *sizes, const double *numbers, const float *guiding, const void *exact, i64 batch,     \
      const void *y, void *x, i64 *steps, unsigned char *found, int threads
#define PASSED wide, sizes, numbers, guiding, exact, batch, y, x, steps, found, threads

#if defined(__x86_64__)
int sparse_recovery_avx2(ARGUMENTS);
int sparse_recovery_avx512(ARGUMENTS);
#endif

extern "C" int eke_sparse_recovery_level(void) { return machine::level(); }

// sizes: n, stride (a multiple of 16), rank, iterations, most entries of a support. numbers: first density, probability
// over density from which entries count in products, most entries missed when least squares are tried, rounding, least
// pivot over the largest, most |x| / |y|. guiding and exact: the projection A^+ A in float and in y's type, n rows `stride` apart, zero beyond n. y and
// x (batch, n), steps and found (batch). wide: double instead of float. Returns 0, or 1 where there was no memory.
extern "C" int eke_sparse_recovery(int level, ARGUMENTS) {
#if defined(__x86_64__)
  if (level > 1) return sparse_recovery_avx512(PASSED);
  if (level > 0) return sparse_recovery_avx2(PASSED);
#endif
  (void)level;
  return sparse_recovery_portable(PASSED);
}
