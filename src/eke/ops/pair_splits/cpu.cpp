// Row pairs of rank one on the CPU, behind a plain C interface.
#define INSTRUCTIONS portable
#include "splits.h"

#if defined(__x86_64__)
int pair_splits_avx2(const Splits& all, bool complex, const double* values, double* right);
#endif

extern "C" int eke_pair_splits_level(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

// See Splits for the shapes. Returns 0, or 1 where there was no memory.
extern "C" int eke_pair_splits(int level, const double* values, int complex, i64 many, i64 rows, i64 cols, i64 levels,
                               const i64* pieces, double* const* u, double* right, int threads) {
  Splits all = {many, rows, cols, levels, pieces, u, threads};
#if defined(__x86_64__)
  if (level > 0) return pair_splits_avx2(all, complex, values, right);
#endif
  (void)level;
  return pair_splits_portable(all, complex, values, right);
}
