// Eight floats at a time.
#include <immintrin.h>
namespace {
constexpr i64 W = 8;
constexpr bool PERMUTES = true;
constexpr int ROWS[5] = {0, 10, 6, 4, 3};
constexpr int COLS = 2;
typedef __m256 vec;
typedef __m256i mask;
typedef __m256i index;
INLINE vec zero() { return _mm256_setzero_ps(); }
INLINE vec all(float v) { return _mm256_set1_ps(v); }
INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
INLINE vec load(const float* p, mask m) { return _mm256_maskload_ps(p, m); }
INLINE void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
INLINE void store_through(float* p, vec v) { _mm256_stream_ps(p, v); }
INLINE void store(float* p, vec v, mask m) { _mm256_maskstore_ps(p, m, v); }
INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
INLINE vec subtract(vec a, vec b) { return _mm256_sub_ps(a, b); }
INLINE vec multiply(vec a, vec b) { return _mm256_mul_ps(a, b); }
INLINE mask first_lanes(i64 n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)(n < W ? n : W)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE mask later_lanes(i64 n) { return _mm256_xor_si256(first_lanes(n), _mm256_set1_epi32(-1)); }
INLINE index indices(const int* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE vec permute(vec v, index i) { return _mm256_permutevar8x32_ps(v, i); }
template <int M> INLINE vec spread(const float* p, mask lo, mask hi, i64 d, index idx) {
  if constexpr (M == SET1) return _mm256_broadcast_ss(p);
  else if constexpr (M == TWO) return _mm256_castpd_ps(_mm256_set1_pd(*(const unaligned_double*)p));
  else if constexpr (M == FOUR) { __m128 q = _mm_loadu_ps(p); return _mm256_set_m128(q, q); }
  else if constexpr (M == PLAIN) return _mm256_loadu_ps(p);
  else if constexpr (M == PERMUTE) return _mm256_permutevar8x32_ps(_mm256_maskload_ps(p, lo), idx);
  else return _mm256_or_ps(_mm256_maskload_ps(p, lo), _mm256_maskload_ps(p - d, hi));
}
INLINE void sums(vec a, vec b, vec c, vec d, float* out) {
  vec s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
// out[l * ld + k] = in[k * stride + l] for k, l < 8.
template <int D> INLINE void transpose(const float* in, i64 stride, float* out, i64 ld) {
  vec r[8], t[8];
  for (int k = 0; k < 8; k++) r[k] = load(in + k * stride);
  for (int k = 0; k < 8; k += 2) {
    t[k] = _mm256_unpacklo_ps(r[k], r[k + 1]);
    t[k + 1] = _mm256_unpackhi_ps(r[k], r[k + 1]);
  }
  for (int k = 0; k < 8; k += 4)
    for (int h = 0; h < 2; h++) {
      r[k + 2 * h] = _mm256_shuffle_ps(t[k + h], t[k + h + 2], 0x44);
      r[k + 2 * h + 1] = _mm256_shuffle_ps(t[k + h], t[k + h + 2], 0xee);
    }
  for (int q = 0; q < 4; q++) {
    store(out + q * ld, _mm256_permute2f128_ps(r[q], r[q + 4], 0x20));
    store(out + (q + 4) * ld, _mm256_permute2f128_ps(r[q], r[q + 4], 0x31));
  }
}
constexpr bool TURNS = false;
}  // namespace
