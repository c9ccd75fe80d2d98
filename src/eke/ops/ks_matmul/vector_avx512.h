// Sixteen floats at a time. Loads of a row's values come in seven kinds, because d values are shared by all k.
#include <immintrin.h>
namespace {
constexpr i64 W = 16;
constexpr bool PERMUTES = true;
constexpr int ROWS[5] = {0, 12, 12, 8, 6};
constexpr int COLS = 4;
typedef __m512 vec;
typedef __mmask16 mask;
typedef __m512i index;
INLINE vec zero() { return _mm512_setzero_ps(); }
INLINE vec all(float v) { return _mm512_set1_ps(v); }
INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
INLINE vec load(const float* p, mask m) { return _mm512_maskz_loadu_ps(m, p); }
INLINE void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
INLINE void store_through(float* p, vec v) { _mm512_stream_ps(p, v); }
INLINE void store(float* p, vec v, mask m) { _mm512_mask_storeu_ps(p, m, v); }
INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
INLINE vec subtract(vec a, vec b) { return _mm512_sub_ps(a, b); }
INLINE vec multiply(vec a, vec b) { return _mm512_mul_ps(a, b); }
INLINE mask first_lanes(i64 n) { return n >= W ? (mask)0xffff : (mask)((1u << n) - 1u); }
INLINE mask later_lanes(i64 n) { return (mask)~first_lanes(n); }
INLINE index indices(const int* p) { return _mm512_loadu_si512(p); }
INLINE vec permute(vec v, index i) { return _mm512_permutexvar_ps(i, v); }
template <int M> INLINE vec spread(const float* p, mask lo, mask hi, i64 d, index idx) {
  if constexpr (M == SET1) return _mm512_set1_ps(*p);
  else if constexpr (M == TWO) return _mm512_castpd_ps(_mm512_set1_pd(*(const unaligned_double*)p));
  else if constexpr (M == FOUR) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
  else if constexpr (M == EIGHT) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  else if constexpr (M == PLAIN) return _mm512_loadu_ps(p);
  else if constexpr (M == PERMUTE) return _mm512_permutexvar_ps(idx, _mm512_maskz_loadu_ps(lo, p));
  else return _mm512_mask_loadu_ps(_mm512_maskz_loadu_ps(lo, p), hi, p - d);
}
// out[0..3] are the sums of the four vectors.
INLINE void sums(vec a, vec b, vec c, vec d, float* out) {
  vec p = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  vec q = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  __m512d pd = _mm512_castps_pd(p), qd = _mm512_castps_pd(q);
  vec s = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(pd, qd)), _mm512_castpd_ps(_mm512_unpackhi_pd(pd, qd)));
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(s), _mm512_extractf32x8_ps(s, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}
// r[q], r[q + 4], r[q + 8], r[q + 12] hold rows of four quarters each: writes the quarters' transpose.
INLINE void quarters(vec a, vec b, vec c, vec d, float* out, i64 step) {
  vec u = _mm512_shuffle_f32x4(a, b, 0x88), v = _mm512_shuffle_f32x4(a, b, 0xdd);
  vec s = _mm512_shuffle_f32x4(c, d, 0x88), z = _mm512_shuffle_f32x4(c, d, 0xdd);
  store(out, _mm512_shuffle_f32x4(u, s, 0x88));
  store(out + step, _mm512_shuffle_f32x4(v, z, 0x88));
  store(out + 2 * step, _mm512_shuffle_f32x4(u, s, 0xdd));
  store(out + 3 * step, _mm512_shuffle_f32x4(v, z, 0xdd));
}
INLINE void pairs(vec& a, vec& b) {
  __m512d u = _mm512_castps_pd(a), v = _mm512_castps_pd(b);
  a = _mm512_castpd_ps(_mm512_unpacklo_pd(u, v));
  b = _mm512_castpd_ps(_mm512_unpackhi_pd(u, v));
}
// out[l * ld + (k, j)] = in[k * stride + (l, j)] with j < D and k, l < W / D.
template <int D> INLINE void transpose(const float* in, i64 stride, float* out, i64 ld) {
  vec r[16 / D];
#pragma GCC unroll 16
  for (int k = 0; k < 16 / D; k++) r[k] = load(in + k * stride);
  if constexpr (D == 1) {
    vec t[16];
#pragma GCC unroll 16
    for (int k = 0; k < 16; k += 4) {
      t[k] = _mm512_unpacklo_ps(r[k], r[k + 1]);
      t[k + 1] = _mm512_unpacklo_ps(r[k + 2], r[k + 3]);
      t[k + 2] = _mm512_unpackhi_ps(r[k], r[k + 1]);
      t[k + 3] = _mm512_unpackhi_ps(r[k + 2], r[k + 3]);
      pairs(t[k], t[k + 1]);
      pairs(t[k + 2], t[k + 3]);
    }
#pragma GCC unroll 16
    for (int q = 0; q < 4; q++) quarters(t[q], t[q + 4], t[q + 8], t[q + 12], out + q * ld, 4 * ld);
  } else if constexpr (D == 2) {
    for (int k = 0; k < 8; k += 2) pairs(r[k], r[k + 1]);
    for (int q = 0; q < 2; q++) quarters(r[q], r[q + 2], r[q + 4], r[q + 6], out + q * ld, 2 * ld);
  } else {
    quarters(r[0], r[1], r[2], r[3], out, ld);
  }
}
constexpr bool TURNS = true;
}  // namespace
