// Neighbouring factors with b = c = 2 in half of the operations.
// Rows are divided by their entry on the diagonal: y0 = x0 + r0 * x1, y1 = x1 + r1 * x0. What was divided by goes
// into the columns of the next factor and, behind the last one, into one product. Several factors are worked on in
// registers: those that pair lanes of one vector, and up to MOST that pair vectors. Every output has the error bound of
// the plain product; where a divisor is zero or far from one, or a result is not finite, the plain product is taken.
namespace {

constexpr int MOST = 3;
constexpr int HOLDS = W == 16 ? 16 : 8;  // vectors worked on at once
constexpr double LEAST_SCALE = 0x1p-60, MOST_SCALE = 0x1p20;

inline bool is_butterfly(const Factor& f) {
  return f.b == 2 && f.c == 2 && (f.d & (f.d - 1)) == 0 && f.a * 2 * f.d % 16 == 0;
}

// How many factors from here on are butterflies; one alone gains nothing.
inline i64 run_of(const Factor* f, i64 count) {
  i64 run = 0;
  while (run < count && is_butterfly(f[run])) run++;
  return run > 1 ? run : 0;
}

// What one pass takes of the run: as many factors within vectors as come first, then up to MOST across, or the reverse.
i64 plan_pass(const Factor* f, i64 run, Ready& q) {
  q = Ready{f[0], BUTTERFLY, nullptr, 0, 0, {0}, {0}, f[0].d < W, false};
  i64 taken = 0;
  for (; taken < run; taken++) {
    const i64 d = f[taken].d;
    if (d < W) {
      if (q.lanes == 4 || (q.lanes_first && q.across)) break;
      q.lane[q.lanes++] = d;
    } else {
      bool again = false;
      for (i64 e = 0; e < q.across; e++) again = again || q.step[e] == d / W;
      if (again || q.across == MOST || (q.lanes && !q.lanes_first)) break;
      q.step[q.across++] = d / W;
    }
  }
  return taken;
}

// Visits the first vector of each group that a pass works on.
template <class Visit> INLINE void groups(const Ready& q, Visit visit) {
  const i64 vectors = q.f.a * 2 * q.f.d / W;
  i64 taken = 0;
  for (i64 e = 0; e < q.across; e++) taken |= q.step[e];
  for (i64 v = 0; v < vectors; v = ((v | taken) + 1) & ~taken) visit(v);
}

inline i64 offset_of(const Ready& q, i64 m) {
  i64 offset = 0;
  for (i64 e = 0; e < q.across; e++) offset += (m >> e & 1) * q.step[e];
  return offset;
}

// Coefficients of one pass, group by group; scale: what the pass before left to multiply by. False: out of range.
bool pack_pass(const Factor* f, const Ready& q, double* scale, float* out) {
  const i64 members = (i64)1 << q.across, count = q.lanes + q.across;
  bool fine = true;
  groups(q, [&](i64 v) {
    double old[(1 << MOST) * W], now[(1 << MOST) * W];
    for (i64 m = 0; m < members; m++)
      for (i64 e = 0; e < W; e++) now[m * W + e] = scale[(v + offset_of(q, m)) * W + e];
    for (i64 level = 0; level < count; level++) {
      const Factor& g = f[level];
      const i64 far = q.lanes_first ? level - q.lanes : level, other = g.d < W ? g.d : ((i64)1 << far) * W;
      memcpy(old, now, members * W * sizeof(double));
      for (i64 m = 0; m < members; m++)
        for (i64 e = 0; e < W; e++) {
          const i64 at = m * W + e, place = (v + offset_of(q, m)) * W + e, k = place / g.d % 2;
          const float* w = g.w + place / (2 * g.d) * g.sa + k * g.sb + place % g.d * g.sd;
          now[at] = w[k * g.sc] * old[at];
          const double r = w[(1 - k) * g.sc] * old[at ^ other] / now[at], size = now[at] < 0 ? -now[at] : now[at];
          fine = fine && size >= LEAST_SCALE && size <= MOST_SCALE && r <= 1 / LEAST_SCALE && r >= -1 / LEAST_SCALE;
          out[at] = (float)r;
        }
      out += members * W;
    }
    for (i64 m = 0; m < members; m++)
      for (i64 e = 0; e < W; e++) {
        scale[(v + offset_of(q, m)) * W + e] = now[m * W + e];
        if (q.scaled) out[m * W + e] = (float)now[m * W + e];
      }
    if (q.scaled) out += members * W;
  });
  return fine;
}

// The passes of a run, or 0 where it must be multiplied plainly. scale: two floats for each feature.
i64 pack_butterfly(const Factor* f, i64 run, Ready* ready, float* out, double* scale) {
  const i64 width = f[0].a * 2 * f[0].d;
  for (i64 e = 0; e < width; e++) scale[e] = 1.0;
  i64 passes = 0;
  for (i64 done = 0; done < run; passes++) {
    Ready& q = ready[passes];
    const i64 taken = plan_pass(f + done, run - done, q);
    q.scaled = done + taken == run;
    q.packed = out;
    if (!pack_pass(f + done, q, scale, out)) return 0;
    out += width * (taken + q.scaled);
    done += taken;
  }
  return passes;
}

// Rows ahead of the ones worked on: their lines are fetched in some of the passes.
struct Ahead { const float* x; i64 stride, rows, part, parts; };

// Else the compiler reads a coefficient from memory for each row, and reading is what limits.
#define HOLD(V) if constexpr (B > 1 && W == 16) asm("" : "+v"(V))

// B rows of one group. Outputs are added up: the sum is finite unless an output is not, or nearly not.
template <int F, int B> INLINE void pass_rows(const Ready& q, const float* w, const int (*index_of)[W],
                                              const i64* place, const float* x, i64 xs, float* y, i64 ys, bool stream, vec* total) {
  constexpr int M = 1 << F;
  vec s[B][M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < B; r++) s[r][m] = load(x + r * xs + place[m]);
  auto within = [&]() __attribute__((always_inline)) {
    for (i64 l = 0; l < q.lanes; l++, w += M * W) {
      const index idx = indices(index_of[l]);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) {
        vec c = load(w + m * W);
        HOLD(c);
#pragma GCC unroll 16
        for (int r = 0; r < B; r++) s[r][m] = fma(c, permute(s[r][m], idx), s[r][m]);
      }
    }
  };
  if (q.lanes_first) within();
#pragma GCC unroll 4
  for (int e = 0; e < F; e++, w += M * W)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      if (!(m >> e & 1)) {
        const int n = m | 1 << e;
        vec c = load(w + m * W), d = load(w + n * W);
        HOLD(c); HOLD(d);
#pragma GCC unroll 16
        for (int r = 0; r < B; r++) {
          const vec left = s[r][m];
          s[r][m] = fma(c, s[r][n], left);
          s[r][n] = fma(d, left, s[r][n]);
        }
      }
  if (!q.lanes_first) within();
  if (q.scaled)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      vec c = load(w + m * W);
      HOLD(c);
#pragma GCC unroll 16
      for (int r = 0; r < B; r++) {
        s[r][m] = multiply(s[r][m], c);
        total[m % 4] = add(total[m % 4], s[r][m]);
      }
    }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 16
    for (int r = 0; r < B; r++) {
      if (stream) store_through(y + r * ys + place[m], s[r][m]);
      else store(y + r * ys + place[m], s[r][m]);
    }
}

template <int F> bool pass(const Ready& q, const float* x, i64 xs, float* y, i64 ys, i64 n, bool stream,
                           const Ahead& ahead) {
  constexpr int M = 1 << F, B = HOLDS / M;
  int index_of[4][W];
  for (i64 l = 0; l < q.lanes; l++)
    for (i64 e = 0; e < W; e++) index_of[l][e] = (int)(e ^ q.lane[l]);
  i64 offset[M], place[M];
  for (i64 m = 0; m < M; m++) offset[m] = offset_of(q, m) * W;
  vec total[4] = {zero(), zero(), zero(), zero()};
  // Where outputs go to memory, row after row.
  const i64 band = stream ? B : n;
  for (i64 from = 0; from < n; from += band) {
    const i64 to = least(from + band, n);
    const float* w = q.packed;
    groups(q, [&](i64 v) {
      for (i64 m = 0; m < M; m++) place[m] = v * W + offset[m];
      i64 r = from;
      for (; r + B <= to; r += B) {
        for (i64 e = r + (r + ahead.part) % ahead.parts; e < least(r + B, ahead.rows); e += ahead.parts)
          for (i64 m = 0; m < M; m++) __builtin_prefetch(ahead.x + e * ahead.stride + place[m], 0, 2);
        pass_rows<F, B>(q, w, index_of, place, x + r * xs, xs, y + r * ys, ys, stream, total);
      }
      for (; r < to; r++) pass_rows<F, 1>(q, w, index_of, place, x + r * xs, xs, y + r * ys, ys, stream, total);
      w += (q.lanes + F + q.scaled) * M * W;
    });
  }
  float out[W];
  store(out, add(add(total[0], total[1]), add(total[2], total[3])));
  bool fine = true;
  for (i64 e = 0; e < W; e++) fine = fine && out[e] - out[e] == 0.0f;
  return fine;
}

#undef HOLD

// n rows through one pass; false where an output is not finite.
bool butterfly_first(const Ready& q, const float* x, i64 xs, float* y, i64 ys, i64 n, bool stream, const Ahead& ahead) {
  stream = stream && ((uintptr_t)y & 63) == 0 && ys % 16 == 0;
  switch (q.across) {
    case 3: return pass<3>(q, x, xs, y, ys, n, stream, ahead);
    case 2: return pass<2>(q, x, xs, y, ys, n, stream, ahead);
    case 1: return pass<1>(q, x, xs, y, ys, n, stream, ahead);
    default: return pass<0>(q, x, xs, y, ys, n, stream, ahead);
  }
}

}  // namespace
