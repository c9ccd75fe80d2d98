"""The kernel of clustered attention under AddressSanitizer: no read or write outside of any buffer, at any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from eke.ops.clustered_attention import native

PROGRAM = """
#include "call.h"
#include <stdio.h>
#include <stdlib.h>
#include <initializer_list>

extern "C" int eke_clustered_level(void);
extern "C" int eke_clusters(int, int, Call*);

static unsigned seed = 1;
static unsigned draw() { seed = seed * 1664525u + 1013904223u; return seed >> 8; }
static float* filled(i64 n) {
  float* p = (float*)malloc(n * sizeof(float));
  for (i64 e = 0; e < n; e++) p[e] = (float)(draw() % 2000) / 1000.0f - 1.0f;
  return p;
}
static i64* numbers(i64 n, i64 low, i64 high) {
  i64* p = (i64*)malloc(n * sizeof(i64));
  for (i64 e = 0; e < n; e++) p[e] = low + draw() % (high - low + 1);
  return p;
}

int main() {
  const i64 sizes[] = {1, 16, 33}, lengths[] = {1, 7, 65, 130}, counts[] = {1, 5, 49, 130};
  i64 cases = 0;
  for (int level = 0; level <= eke_clustered_level(); level++)
    for (i64 d : sizes) for (i64 m : {1, 17, 64}) for (i64 n : lengths)
    for (i64 s : {1, 64, 300}) for (i64 c : counts) {
      const i64 batch = 2, heads = 2, rows = batch * heads;
      Call call = {};
      call.threads = 2; call.batch = batch; call.heads = heads; call.length = n; call.keys = s; call.dim = d;
      call.key = cases % 2;
      call.values = m; call.clusters = c; call.iterations = 3; call.sphere = n % 2; call.scale = 0.3f;
      float *q = filled(rows * n * d), *k = filled(rows * s * d), *v = filled(rows * s * m);
      call.q = {q, n * heads * d, d, heads * d};
      call.k = {k, s * heads * d, d, heads * d};
      call.v = {v, s * heads * m, m, heads * m};
      i64 *used = numbers(heads, 1, c), *topk = numbers(heads, 0, s), *groups = numbers(rows * n, -1, c - 1);
      i64* first = numbers(rows * c, 0, n - 1);
      unsigned char *mask = (unsigned char*)malloc(batch * s), *real = (unsigned char*)malloc(batch * n);
      for (i64 e = 0; e < batch * s; e++) mask[e] = draw() % 2;
      for (i64 e = 0; e < batch * n; e++) real[e] = draw() % 2;
      float* owned[] = {filled(rows * c * d), filled(batch * n * heads * m), filled(rows * n), filled(rows * d * d),
                        filled(64 * d), filled(64)};
      call.used = used; call.topk = topk; call.groups = groups; call.first = first; call.centres = owned[0];
      call.out = owned[1]; call.lse = owned[2]; call.metric = owned[3]; call.planes = owned[4];
      call.thresholds = owned[5];
      if (cases % 3) { call.mask = mask; call.query_mask = real; }
      // Attention reads groups below the number of each head's clusters.
      for (i64 e = 0; e < rows * n; e++) groups[e] = groups[e] < used[e / n % heads] ? groups[e] : -1;
      for (int job : {3, 4, 0, 1, 2, 0}) if (eke_clusters(level, job, &call)) return 1;
      for (i64 e = 0; e < batch * n * heads * m; e++) if (!(call.out[e] == call.out[e])) return 2;
      for (float* p : owned) free(p);
      free(q); free(k); free(v); free(used); free(topk); free(groups); free(first); free(mask); free(real);
      cases++;
    }
  printf("%lld cases\\n", (long long)cases);
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_of_a_buffer(sanitized):
    assert sanitized(PROGRAM, Path(native.__file__).parent, units=3) >= 400
