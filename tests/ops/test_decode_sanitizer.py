"""The step of decoding under AddressSanitizer: no read or write outside of any buffer, at any size, any level."""

from __future__ import annotations

from pathlib import Path

import pytest

from eke.ops.decode import native

PROGRAM = """
#include "call.h"
#include <stdio.h>
#include <stdlib.h>
#include <vector>

extern "C" int eke_decode_level(void);
extern "C" int eke_decode(int, Step*);

static std::vector<float*> owned;
static float* filled(i64 n, unsigned seed) {
  float* p = (float*)malloc(n * sizeof(float));
  for (i64 e = 0; e < n; e++) { seed = seed * 1664525u + 1013904223u; p[e] = (float)(seed >> 16) / 65536.0f - 0.5f; }
  owned.push_back(p);
  return p;
}
static Matrix matrix(i64 rows, i64 columns) { return {filled(rows * columns, 1), filled(rows, 2)}; }

int main() {
  // Sizes rise: scratch space is then made anew, and just as large as a call needs, for most of them.
  const i64 sizes[] = {1, 3, 8, 17, 32, 64, 80}, inners[] = {1, 30, 260};
  i64 cases = 0;
  for (int level = 0; level <= eke_decode_level(); level++)
    for (i64 size : sizes) for (i64 heads = 1; heads < 4; heads += 2) for (i64 inner : inners)
      for (i64 batch : {1, 2, 5, 13}) for (i64 threads = 1; threads < 3; threads++) {
        const i64 width = heads * size, capacity = 1 + (size + inner) % 40;
        const i64 starts[13] = {0, 1, 100, -5};
        unsigned char* real = (unsigned char*)malloc(batch * 40);
        Layer layers[8] = {};
        for (i64 i = 0; i < 8; i++) {
          Layer& l = layers[i];
          l.attention = i < 3 ? LINEAR : i < 5 ? SOFTMAX : HYBRID;
          l.key_heads = i == 6 ? 1 : heads;
          l.map = i == 5 ? T2R : i == 6 ? HEDGEHOG : i == 7 ? ELU : i % 3;
          l.features = l.map == T2R ? 1 + size * 2 / 3 : l.map == HEDGEHOG ? 2 * size : size;
          l.normalize = i == 0; l.delta = i == 2; l.decay = i % 3;
          l.before = l.between = {1 + i % 2, 1e-5, filled(width, 3), filled(width, 4)};
          l.inside = {i ? RMS_NORM : NO_NORM, 1e-5, filled(size, 3), nullptr};
          l.query = matrix(width, width); l.key = matrix(l.key_heads * size, width);
          l.value = matrix(l.key_heads * size, width); l.out = matrix(width, width);
          l.up = matrix(inner, width); l.down = matrix(width, inner);
          l.gate = matrix(l.decay == BY_FEATURE ? width : heads, width); l.rate = matrix(heads, width);
          if (i % 3 == 0) l.gated = matrix(inner, width);
          if (l.attention == HYBRID) {
            const i64 columns = l.map == T2R ? l.features : size;
            l.window = i == 7 ? 0 : i == 6 ? 1 : capacity; l.filled = l.window / 2;
            l.memory = filled(batch * heads * l.features * size, 5); l.keys = filled(batch * heads * l.features, 6);
            for (i64 e = 0; e < batch * heads * l.features; e++) l.keys[e] += 1;
            l.near_keys = filled(batch * width * l.window, 7); l.near_values = filled(batch * width * l.window, 8);
            l.balance = filled(heads, 9);
            if (i < 7) {
              l.query_map = {filled(heads * size * columns, 3), i == 5 ? filled(heads * columns, 4) : nullptr};
              l.key_map = {filled(heads * size * columns, 5), i == 5 ? filled(heads * columns, 6) : nullptr};
            }
            if (i == 5) real = (unsigned char*)realloc(real, batch * l.window);
            for (i64 e = 0; e < batch * l.window; e++) real[e] = e % 3 != 0;
            l.real = real;
          } else if (l.attention == LINEAR) {
            l.memory = filled(batch * width * size, 5); l.keys = filled(batch * width, 6);
          } else {
            l.keys = filled(batch * width * capacity, 7); l.values = filled(batch * width * capacity, 8);
            l.batch_stride = width * capacity; l.head_stride = size * capacity; l.filled = capacity - 1;
            l.starts = i == 4 ? starts : nullptr; l.window = i == 4 ? 7 : 0;
          }
        }
        Step s = {threads, batch, width, heads, inner, cases % 4, 8, 7, layers};
        if (size % 2 == 0) {
          s.rotation_stride = cases % 3 ? size : 0;
          s.cosines = filled(s.rotation_stride ? batch * size : size, 12);
          s.sines = filled(s.rotation_stride ? batch * size : size, 13);
        }
        s.last = {LAYER_NORM, 1e-5, filled(width, 3), nullptr};
        s.head = matrix(7, width);
        s.x = filled(batch * width, 9);
        s.out = filled(batch * 7, 10);
        if (eke_decode(level, &s)) return 1;
        for (i64 e = 0; e < batch * 7; e++) if (!(s.out[e] == s.out[e])) return 2;
        s.head = {};
        s.outputs = width;
        s.out = filled(batch * width, 11);
        if (eke_decode(level, &s)) return 3;
        for (float* p : owned) free(p);
        free(real);
        owned.clear();
        cases++;
      }
  printf("%lld cases\\n", (long long)cases);
  return 0;
}
"""


@pytest.mark.slow
def test_no_access_outside_of_a_buffer(sanitized):
    assert sanitized(PROGRAM, Path(native.__file__).parent, "-fopenmp", units=3) >= 300
