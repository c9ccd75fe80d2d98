// Causal linear attention on the CPU, behind a plain C interface: which instructions this machine has, scratch memory.
#define INSTRUCTIONS portable
#define LANES 4
#include "body.h"
#include "../machine.h"

#if defined(__x86_64__)
int attention_forward_avx2(const Call& c);
int attention_forward_avx512(const Call& c);
int attention_backward_avx2(const Call& c);
int attention_backward_avx512(const Call& c);
#endif

namespace {

// Positions times sizes of a state from which threads pay.
constexpr i64 PARALLEL_WORK = 1 << 20;

void prepare(Call& c) {
  c.scratch = machine::scratch;
  const i64 work = c.batch * c.heads * c.length * c.features * c.values;
  if (work < PARALLEL_WORK || c.threads < 1) c.threads = 1;
  c.threads = least(c.threads, c.batch * c.heads);
}

}  // namespace

extern "C" {

// 2: AVX-512, 1: AVX2 with fused multiply-add, 0: plain C++.
int eke_attention_level(void) { return machine::level(); }

// The fields of Call that the direction needs; 0 for success, 2 where there is no memory.
int eke_attention(int level, int backward, Call* call) {
  prepare(*call);
  if (call->threads < 1) return 0;
#if defined(__x86_64__)
  if (level > 1) return backward ? attention_backward_avx512(*call) : attention_forward_avx512(*call);
  if (level > 0) return backward ? attention_backward_avx2(*call) : attention_forward_avx2(*call);
#endif
  (void)level;
  return backward ? attention_backward_portable(*call) : attention_forward_portable(*call);
}
}
