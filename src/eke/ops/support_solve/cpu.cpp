// Least squares on supports on the CPU, behind a plain C interface.
#define INSTRUCTIONS portable
#define VECTOR 16
#define TILE 2
#include "../machine.h"
#include "body.h"

#if defined(__x86_64__)
int support_solve_avx2(int, i64, i64, i64, const void*, const i64*, const void*, void*, unsigned char*, double, int);
int support_solve_avx512(int, i64, i64, i64, const void*, const i64*, const void*, void*, unsigned char*, double, int);
#endif

extern "C" int eke_support_solve_level(void) { return machine::level(); }

// gram (n, n), support (batch, k), right and x (batch, n), failed (batch); wide: double instead of float.
// Returns 0, or 1 where there was no memory.
extern "C" int eke_support_solve(int level, int wide, i64 batch, i64 n, i64 k, const void* gram, const i64* support,
                                 const void* right, void* x, unsigned char* failed, double rounding, int threads) {
#if defined(__x86_64__)
  if (level > 1) return support_solve_avx512(wide, batch, n, k, gram, support, right, x, failed, rounding, threads);
  if (level > 0) return support_solve_avx2(wide, batch, n, k, gram, support, right, x, failed, rounding, threads);
#endif
  (void)level;
  return support_solve_portable(wide, batch, n, k, gram, support, right, x, failed, rounding, threads);
}
