// Clustered attention on the CPU, behind a plain C interface: which instructions this machine has, scratch memory.
#define INSTRUCTIONS portable
#define LANES 4
#include "body.h"
#include "../machine.h"

#if defined(__x86_64__)
int clustered_avx2(const Call& c, i64 job);
int clustered_avx512(const Call& c, i64 job);
#endif

namespace {

// Positions times sizes from which threads pay.
constexpr i64 PARALLEL_WORK = 1 << 16;

}  // namespace

extern "C" {

// 2: AVX-512, 1: AVX2 with fused multiply-add, 0: plain C++.
int eke_clustered_level(void) { return machine::level(); }

// The fields of Call that the job needs; 0 for success, 2 where there is no memory.
int eke_clusters(int level, int job, Call* call) {
  Call& c = *call;
  c.scratch = machine::scratch;
  const i64 heads = c.batch * c.heads;
  if (heads < 1) return 0;
  if (c.threads < 1 || heads * (c.length + c.keys) * c.dim < PARALLEL_WORK) c.threads = 1;
  c.threads = least(c.threads, heads);
#if defined(__x86_64__)
  if (level > 1) return clustered_avx512(c, job);
  if (level > 0) return clustered_avx2(c, job);
#endif
  (void)level;
  return clustered_portable(c, job);
}
}
