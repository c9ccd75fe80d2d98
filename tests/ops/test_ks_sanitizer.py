"""The native kernels under AddressSanitizer: no read or write outside of any buffer, in any instruction set."""

from __future__ import annotations

from pathlib import Path

import pytest

from eke import ops

SOURCES = Path(ops.__file__).parent / "ks_matmul"
PROGRAM = """
#include "common.h"
#include <initializer_list>
#include <stdio.h>
#include <stdlib.h>

extern "C" int eke_ks_level(void);
extern "C" int eke_ks_forward(int, i64, i64, i64, i64, const void*, i64, void*, i64, i64, const Factor*, const float*,
                              i64);
struct Source { const void* entries; i64 bytes; };
extern "C" void* eke_ks_keep(int, i64, i64, i64, i64, const Factor*, i64, i64, const Source*);
extern "C" int eke_ks_kept(const void*, i64, const void*, void*, const float*);
extern "C" void eke_ks_drop(void*);
extern "C" int eke_ks_gradient(int, i64, i64, i64, const float*, i64, const float*, i64, float*, i64, i64, i64, i64);

// Buffers of exactly the size needed, so that one float too far is caught.
static float* filled(i64 n, unsigned seed) {
  float* p = (float*)malloc(n * sizeof(float));
  for (i64 e = 0; e < n; e++) { seed = seed * 1664525u + 1013904223u; p[e] = (float)(seed >> 16) / 65536.0f - 0.5f; }
  return p;
}

int main() {
  const i64 sizes[] = {1, 2, 3, 4, 5, 8, 12, 17}, strides[] = {1, 2, 3, 4, 5, 8, 12, 16, 20, 24, 48};
  const i64 batches[] = {1, 5, 18, 70};
  i64 cases = 0;
  for (int level = 0; level <= eke_ks_level(); level++)
    for (i64 a : {1, 3}) for (i64 b : sizes) for (i64 c : sizes) for (i64 d : strides) for (i64 n : batches)
      for (i64 layout = 0; layout < 2; layout++) {
        i64 in = a * c * d, out = a * b * d;
        float *x = filled(in * n, 1), *w = filled(a * b * c * d, 2), *y = filled(out * n, 3);
        float* g = filled(a * b * c * d, 4);
        i64 xs = layout ? n : in, ys = layout ? n : out;
        Factor f = {a, b, c, d, b * c * d, c * d, d, 1, w}, t = {a, c, b, d, b * c * d, d, c * d, 1, w};
        if (eke_ks_forward(level, 1, layout, 0, n, x, xs, y, ys, 1, &f, nullptr, 0)) return 1;
        float* again = filled(out * n, 6);
        Source whole = {w, (i64)sizeof(float) * a * b * c * d};
        void* kept = eke_ks_keep(level, 1, layout, 0, 1, &f, 0, 1, &whole);
        if (!kept || eke_ks_kept(kept, n, x, again, nullptr)) return 3;
        for (i64 e = 0; e < out * n; e++) if (again[e] != y[e]) return 4;
        w[a * b * c * d - 1] += 1;
        if (eke_ks_kept(kept, n, x, again, nullptr) != -1) return 5;
        w[a * b * c * d - 1] -= 1;
        eke_ks_drop(kept);
        free(again);
        float* back = filled(in * n, 5);
        if (eke_ks_forward(level, 1, layout, 0, n, y, ys, back, xs, 1, &t, nullptr, 1)) return 1;
        if (eke_ks_gradient(level, 1, layout, n, x, xs, y, ys, g, a, b, c, d)) return 1;
        // <K x, K x> = <K^T K x, x> where nothing was clipped, and = <w, gradient>.
        double left = 0, right = 0;
        for (i64 e = 0; e < out * n; e++) left += (double)y[e] * y[e];
        for (i64 e = 0; e < a * b * c * d; e++) right += (double)w[e] * g[e];
        if (!(left - right < 1e-3 * (1 + left) && right - left < 1e-3 * (1 + left))) return 2;
        free(x); free(w); free(y); free(g); free(back);
        cases++;
      }
  // Batches that no cache holds: gradients copy and fetch ahead.
  const i64 far[][5] = {{64, 16, 16, 1, 1030}, {3, 12, 17, 3, 5001}, {1, 9, 40, 16, 1500}, {256, 2, 2, 2, 600}};
  for (int level = 0; level <= eke_ks_level(); level++)
    for (i64 threads = 1; threads < 3; threads++)
      for (auto& p : far) for (i64 layout = 0; layout < 2; layout++) {
        i64 in = p[0] * p[2] * p[3], out = p[0] * p[1] * p[3], n = p[4], xs = layout ? n : in, ys = layout ? n : out;
        float *x = filled(in * n, 1), *y = filled(out * n, 3), *g = filled(p[0] * p[1] * p[2] * p[3], 4);
        if (eke_ks_gradient(level, threads, layout, n, x, xs, y, ys, g, p[0], p[1], p[2], p[3])) return 6;
        free(x); free(y); free(g);
        cases++;
      }
  // Runs of factors with b = c = 2, packed in the call and before it.
  for (int level = 0; level <= eke_ks_level(); level++)
    for (i64 threads = 1; threads < 3; threads++)
      for (i64 size : {16, 48, 64, 512}) for (i64 n : {1, 5, 70, 700}) for (i64 down = 0; down < 2; down++) {
        Factor f[16];
        i64 count = 0;
        for (i64 d = 1; size % (2 * d) == 0; d *= 2) count++;
        for (i64 s = 0; s < count; s++) {
          const i64 d = (i64)1 << (down ? count - 1 - s : s);
          f[s] = {size / (2 * d), 2, 2, d, 4 * d, 2 * d, d, 1, filled(2 * size, (unsigned)d)};
        }
        float *x = filled(size * n, 1), *y = filled(size * n, 3), *again = filled(size * n, 4);
        if (eke_ks_forward(level, threads, 0, 0, n, x, size, y, size, count, f, nullptr, 0)) return 7;
        Source whole = {f[0].w, (i64)sizeof(float) * 2 * size};
        void* kept = eke_ks_keep(level, threads, 0, 0, count, f, 0, 1, &whole);
        if (!kept || eke_ks_kept(kept, n, x, again, nullptr)) return 8;
        for (i64 e = 0; e < size * n; e++) if (again[e] != y[e]) return 9;
        eke_ks_drop(kept);
        for (i64 s = 0; s < count; s++) free((void*)f[s].w);
        free(x); free(y); free(again);
        cases++;
      }
  printf("%lld cases\\n", (long long)cases);
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_of_a_buffer(sanitized):
    assert sanitized(PROGRAM, SOURCES, units=5) > 10_000
