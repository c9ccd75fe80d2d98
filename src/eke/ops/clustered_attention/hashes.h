// K-means on hashes: bit b of a query's hash is [W_b . q > t_b]; centres are bitwise majorities. Part of body.h.

struct Hashes {
  u64 *hashes, *centres;
  float *turned;
  int32_t* votes;  // (clusters, 64): how often a bit is set
  int32_t* counts;
  i64 size;
  Hashes(const Call& c, float* memory) {
    Room room(memory);
    hashes = (u64*)room.take(2 * up(c.length, 8));
    centres = (u64*)room.take(2 * c.clusters);
    turned = room.take(64 * c.dim);
    votes = (int32_t*)room.take(64 * c.clusters);
    counts = (int32_t*)room.take(c.clusters);
    size = room.used;
  }
};

inline u64 bits_above(vec x, const float* thresholds) {
#if LANES == 16
  return _mm512_cmp_ps_mask((__m512)x, _mm512_loadu_ps(thresholds), _CMP_GT_OQ);
#else
  u64 found = 0;
  for (i64 l = 0; l < W; l++) found |= (u64)(x[l] > thresholds[l]) << l;
  return found;
#endif
}

template <int R> inline void hash_rows(const Call& c, const Hashes& w, const float* points, i64 stride, u64* hashes) {
  for (int r = 0; r < R; r++) hashes[r] = 0;
  for (i64 p = 0; p < 64; p += PANEL) {
    vec acc[R][COLS];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < COLS; v++) acc[r][v] = vec{};
    for (i64 k = 0; k < c.dim; k++) {
      vec right[COLS];
      for (int v = 0; v < COLS; v++) right[v] = load(w.turned + k * 64 + p + v * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const vec left = all(points[r * stride + k]);
#pragma GCC unroll 4
        for (int v = 0; v < COLS; v++) acc[r][v] += left * right[v];
      }
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < COLS; v++) hashes[r] |= bits_above(acc[r][v], c.thresholds + p + v * W) << (p + v * W);
  }
}

// Distance and cluster in one number: the least is the nearest, of equally near ones the first.
inline __attribute__((always_inline)) void least_of(const u64* hashes, const u64* centres, i64 used, u64* found) {
  u64 best[8];
  for (i64 l = 0; l < 8; l++) best[l] = ~(u64)0;
  for (i64 j = 0; j < used; j++)
    for (i64 l = 0; l < 8; l++) {
      const u64 key = ((u64)__builtin_popcountll(hashes[l] ^ centres[j]) << 32) + (u64)j;
      best[l] = key < best[l] ? key : best[l];
    }
  for (i64 l = 0; l < 8; l++) found[l] = best[l];
}

#if LANES == 16
// Sixteen hashes at a time in registers.
__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vpopcntdq,popcnt")))
void least_of_sixteen(const u64* hashes, const u64* centres, i64 used, u64* found) {
  const __m512i a = _mm512_loadu_si512(hashes), b = _mm512_loadu_si512(hashes + 8), one = _mm512_set1_epi64(1);
  __m512i least_a = _mm512_set1_epi64(-1), least_b = least_a, number = _mm512_setzero_si512();
  for (i64 j = 0; j < used; j++) {
    const __m512i centre = _mm512_set1_epi64((long long)centres[j]);
    const __m512i far_a = _mm512_slli_epi64(_mm512_popcnt_epi64(_mm512_xor_si512(a, centre)), 32);
    const __m512i far_b = _mm512_slli_epi64(_mm512_popcnt_epi64(_mm512_xor_si512(b, centre)), 32);
    least_a = _mm512_min_epu64(least_a, _mm512_or_si512(far_a, number));
    least_b = _mm512_min_epu64(least_b, _mm512_or_si512(far_b, number));
    number = _mm512_add_epi64(number, one);
  }
  _mm512_storeu_si512(found, least_a);
  _mm512_storeu_si512(found + 8, least_b);
}
#endif

void assign_hashes(const u64* hashes, const u64* centres, i64 length, i64 used, i64* groups) {
  u64 found[16];
  i64 t = 0;
#if LANES == 16
  if (__builtin_cpu_supports("avx512vpopcntdq"))
    for (; t + 16 <= length; t += 16) {
      least_of_sixteen(hashes + t, centres, used, found);
      for (i64 l = 0; l < 16; l++) groups[t + l] = (i64)(found[l] & 0xffffffffu);
    }
#endif
  for (; t < length; t += 8) {
    least_of(hashes + t, centres, used, found);
    for (i64 l = 0; l < least(8, length - t); l++) groups[t + l] = (i64)(found[l] & 0xffffffffu);
  }
}

inline void vote(u64 hash, int32_t* votes) {
#if LANES == 16
  const __m512i one = _mm512_set1_epi32(1);
  for (int p = 0; p < 4; p++) {
    const __m512i now = _mm512_loadu_si512(votes + 16 * p);
    _mm512_storeu_si512(votes + 16 * p, _mm512_mask_add_epi32(now, (__mmask16)(hash >> (16 * p)), now, one));
  }
#else
  for (int p = 0; p < 64; p++) votes[p] += (int32_t)((hash >> p) & 1);
#endif
}

void hashes_head(const Call& c, i64 b, i64 h, float* memory) {
  const Hashes w(c, memory);
  const i64 at = b * c.heads + h, used = least(c.used[h], c.clusters);
  i64* groups = c.groups + at * c.length;
  const unsigned char* real = c.query_mask ? c.query_mask + b * c.length : nullptr;
  turn(c.planes, c.dim, 64, c.dim, w.turned, 64);
  i64 t = 0;
  for (; t + ROWS <= c.length; t += ROWS) hash_rows<ROWS>(c, w, row_of(c.q, b, h, t), c.q.time, w.hashes + t);
  for (; t < c.length; t++) hash_rows<1>(c, w, row_of(c.q, b, h, t), 0, w.hashes + t);
  for (; t < up(c.length, 8); t++) w.hashes[t] = 0;
  for (i64 j = 0; j < used; j++)
    w.centres[j] = c.starts ? c.starts[at * c.clusters + j] : w.hashes[c.first[at * c.clusters + j]];
  for (i64 step = 0; step < c.iterations; step++) {
    assign_hashes(w.hashes, w.centres, c.length, used, groups);
    if (real)
      for (i64 e = 0; e < c.length; e++)
        if (!real[e]) groups[e] = -1;
    if (step + 1 == c.iterations) break;
    memset(w.votes, 0, 64 * c.clusters * sizeof(int32_t));
    memset(w.counts, 0, c.clusters * sizeof(int32_t));
    for (i64 e = 0; e < c.length; e++) {
      if (groups[e] < 0) continue;
      vote(w.hashes[e], w.votes + 64 * groups[e]);
      w.counts[groups[e]]++;
    }
    for (i64 j = 0; j < used; j++) {
      if (!w.counts[j]) continue;
      u64 centre = 0;
      for (int p = 0; p < 64; p++) centre |= (u64)(2 * w.votes[64 * j + p] > w.counts[j]) << p;
      w.centres[j] = centre;
    }
  }
}
