// Vectors of LANES floats in the compiler's own terms, and e^x on them. A translation unit defines LANES first.
#pragma once
#include <stdint.h>
#include <string.h>

namespace {

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

inline vec load(const float* p) { return *(const vec*)p; }
inline void store(float* p, vec v) { *(vec*)p = v; }
inline vec all(float f) { return vec{} + f; }

// The first n floats alone; the others are zero, or left as they are.
inline vec load(const float* p, int64_t n) {
  if (n >= LANES) return load(p);
  float rest[LANES] = {0};
  memcpy(rest, p, n * sizeof(float));
  return load(rest);
}
inline void store(float* p, vec v, int64_t n) {
  if (n >= LANES) return store(p, v);
  float rest[LANES];
  store(rest, v);
  memcpy(p, rest, n * sizeof(float));
}

// e^x for x <= 0, within two units of the last place; the polynomial is that of Cephes.
inline vec exponential(vec x) {
  x = x < -87.0f ? all(-87.0f) : x;
  vec n = x * 1.44269504f + 12582912.0f;
  n = n - 12582912.0f;
  const vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  return p * (vec)power;
}

}  // namespace
