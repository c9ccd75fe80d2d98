// Four floats at a time in plain C++: the compiler finds the instructions.
namespace {
constexpr i64 W = 4;
constexpr bool PERMUTES = false;
constexpr int ROWS[5] = {0, 6, 4, 3, 2};
constexpr int COLS = 2;
struct vec { float v[4]; };
struct mask { int from, to; };
struct index { int v[4]; };
#define LANES for (int e = 0; e < 4; e++)
INLINE vec zero() { return vec{{0, 0, 0, 0}}; }
INLINE vec all(float v) { return vec{{v, v, v, v}}; }
INLINE vec load(const float* p) { vec r; LANES r.v[e] = p[e]; return r; }
INLINE vec load(const float* p, mask m) { vec r = zero(); for (int e = m.from; e < m.to; e++) r.v[e] = p[e]; return r; }
INLINE void store(float* p, vec v) { LANES p[e] = v.v[e]; }
INLINE void store_through(float* p, vec v) { store(p, v); }
INLINE void store(float* p, vec v, mask m) { for (int e = m.from; e < m.to; e++) p[e] = v.v[e]; }
INLINE vec fma(vec a, vec b, vec c) { vec r; LANES r.v[e] = a.v[e] * b.v[e] + c.v[e]; return r; }
INLINE vec add(vec a, vec b) { vec r; LANES r.v[e] = a.v[e] + b.v[e]; return r; }
INLINE vec subtract(vec a, vec b) { vec r; LANES r.v[e] = a.v[e] - b.v[e]; return r; }
INLINE vec multiply(vec a, vec b) { vec r; LANES r.v[e] = a.v[e] * b.v[e]; return r; }
INLINE mask first_lanes(i64 n) { return mask{0, (int)(n < W ? n : W)}; }
INLINE mask later_lanes(i64 n) { return mask{(int)(n < W ? n : W), 4}; }
INLINE index indices(const int* p) { index r; LANES r.v[e] = p[e]; return r; }
INLINE vec permute(vec v, index i) { vec r; LANES r.v[e] = v.v[i.v[e]]; return r; }
template <int M> INLINE vec spread(const float* p, mask lo, mask hi, i64 d, index idx) {
  if constexpr (M == SET1) return vec{{*p, *p, *p, *p}};
  else if constexpr (M == TWO) return vec{{p[0], p[1], p[0], p[1]}};
  else if constexpr (M == PLAIN) return load(p);
  else if constexpr (M == PERMUTE) { vec r; LANES r.v[e] = p[idx.v[e]]; return r; }
  else { vec r = load(p, lo); for (int e = hi.from; e < hi.to; e++) r.v[e] = p[e - d]; return r; }
}
INLINE void sums(vec a, vec b, vec c, vec d, float* out) {
  for (int e = 0; e < 4; e++) out[e] = 0;
  LANES { out[0] += a.v[e]; out[1] += b.v[e]; out[2] += c.v[e]; out[3] += d.v[e]; }
}
template <int D> INLINE void transpose(const float* in, i64 stride, float* out, i64 ld) {
  for (int l = 0; l < 4; l++) LANES out[l * ld + e] = in[e * stride + l];
}
#undef LANES
constexpr bool TURNS = false;
}  // namespace
