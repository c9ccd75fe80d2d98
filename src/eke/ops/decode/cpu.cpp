// One step of decoding on the CPU, behind a plain C interface: which instructions this machine has, scratch memory.
#define INSTRUCTIONS portable
#define LANES 4
#include "body.h"
#include "../machine.h"

#if defined(__x86_64__)
void decode_step_avx2(const Step& s);
void decode_step_avx512(const Step& s);
#endif

extern "C" {

// 2: AVX-512, 1: AVX2 with fused multiply-add, 0: plain C++.
int eke_decode_level(void) { return machine::level(); }

// All layers for one position of each sample. 0 for success, 2 where there is no memory.
int eke_decode(int level, Step* step) {
  Step& s = *step;
  if (s.batch < 1) return 0;
  if (s.threads < 1) s.threads = 1;
  s.memory = machine::scratch(room(s));
  if (!s.memory) return 2;
#if defined(__x86_64__)
  if (level > 1) decode_step_avx512(s);
  else if (level > 0) decode_step_avx2(s);
  else
#endif
    decode_step_portable(s);
  (void)level;
  return 0;
}
}
