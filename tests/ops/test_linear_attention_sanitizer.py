"""The kernel of linear attention under AddressSanitizer: no read or write outside of any buffer, at any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from eke.ops.linear_attention import native

PROGRAM = """
#include "call.h"
#include <stdio.h>
#include <stdlib.h>

extern "C" int eke_attention_level(void);
extern "C" int eke_attention(int, int, Call*);

static float* filled(i64 n, unsigned seed) {
  float* p = (float*)malloc(n * sizeof(float));
  for (i64 e = 0; e < n; e++) { seed = seed * 1664525u + 1013904223u; p[e] = (float)(seed >> 16) / 65536.0f; }
  return p;
}

int main() {
  // Sizes rise: scratch space is then made anew, and just as large as a call needs, for most of them.
  const i64 sizes[] = {1, 3, 8, 17, 32, 64}, lengths[] = {0, 1, 5, 63, 64, 65, 130};
  i64 cases = 0;
  for (int level = 0; level <= eke_attention_level(); level++)
    for (i64 d : sizes) for (i64 m : sizes) for (i64 n : lengths) for (i64 batch = 1; batch < 3; batch++) {
      const i64 heads = 3, row = batch * n * heads, states = batch * heads;
      Call c = {};
      c.threads = 2; c.batch = batch; c.heads = heads; c.length = n; c.features = d; c.values = m;
      c.map = n % 2; c.normalize = d % 2;
      float *q = filled(row * d, 1), *k = filled(row * d, 2), *v = filled(row * m, 3), *g = filled(row * m, 4);
      c.q = {q, n * heads * d, d, heads * d};
      c.k = {k, n * heads * d, d, heads * d};
      c.v = {v, n * heads * m, m, heads * m};
      c.grad = {g, n * heads * m, m, heads * m};
      float* owned[] = {filled(states * d * m, 5), filled(states * d, 6), filled(row * m, 7), filled(row, 8),
                        filled(states * d * m, 9), filled(states * d, 10), filled(states * d * m, 11),
                        filled(states * d, 12), filled(row * d, 13), filled(row * d, 14), filled(row * m, 15),
                        filled(states * d * m, 16), filled(states * d, 17)};
      c.memory = owned[0]; c.keys = owned[1]; c.out = owned[2]; c.bottom = owned[3]; c.last_memory = owned[4];
      c.last_keys = owned[5]; c.grad_memory = owned[6]; c.grad_keys = owned[7]; c.dq = owned[8]; c.dk = owned[9];
      c.dv = owned[10]; c.dmemory = owned[11]; c.dkeys = owned[12];
      if (eke_attention(level, 0, &c) || eke_attention(level, 1, &c)) return 1;
      for (i64 e = 0; e < row * m; e++) if (!(c.out[e] == c.out[e])) return 2;
      for (float* p : owned) free(p);
      free(q); free(k); free(v); free(g);
      cases++;
    }
  printf("%lld cases\\n", (long long)cases);
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_of_a_buffer(sanitized):
    assert sanitized(PROGRAM, Path(native.__file__).parent, units=3) >= 500
