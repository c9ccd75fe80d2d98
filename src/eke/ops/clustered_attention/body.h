// The jobs of clustered attention with one instruction set, a head at a time. Products of matrices go in tiles of
// registers over panels of a right-hand side that was copied together.
#include "../lanes.h"
#include "call.h"
#if LANES == 16
#include <immintrin.h>
#endif
namespace {

constexpr i64 W = LANES;
constexpr int COLS = LANES == 16 ? 4 : 2, ROWS = LANES == 4 ? 4 : 6;
constexpr i64 PANEL = COLS * W;  // columns of a panel
constexpr i64 TOGETHER = 48;     // clusters whose rows are held at once, a multiple of ROWS
constexpr i64 DEPTH = 256;       // values copied together
constexpr i64 WAITING = 256;     // candidates for the largest k, before they are thinned out

inline i64 up(i64 n, i64 to) { return (n + to - 1) / to * to; }
inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
inline i64 most(i64 a, i64 b) { return a < b ? b : a; }
inline float most_of(float a, float b) { return a < b ? b : a; }

inline const float* row_of(const Rows& x, i64 b, i64 h, i64 t) { return x.at + b * x.batch + h * x.head + t * x.time; }

// A row of `size` floats into `wide`, zeros after its end.
inline void copy_row(const float* in, i64 size, float* out, i64 wide) {
  memcpy(out, in, size * sizeof(float));
  for (i64 e = size; e < wide; e++) out[e] = 0.0f;
}

// c[m][n] = (add ? c[m][n] : from[n]) + sum over k < depth of a[m][k] * b[k][n]; n in whole vectors.
struct Product {
  const float* a;
  i64 lda;
  const float* b;
  i64 ldb;
  float* c;
  i64 ldc;
  bool add;
};

template <int R, int N> inline void tile(const Product& p, i64 m, i64 n, i64 depth) {
  vec acc[R][N];
  float* c = p.c + m * p.ldc + n;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) acc[r][v] = p.add ? load(c + r * p.ldc + v * W) : vec{};
  const float* a = p.a + m * p.lda;
  const float* b = p.b + n;
  for (i64 k = 0; k < depth; k++) {
    vec right[N];
    for (int v = 0; v < N; v++) right[v] = load(b + k * p.ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vec left = all(a[r * p.lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) acc[r][v] += left * right[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) store(c + r * p.ldc + v * W, acc[r][v]);
}

template <int R> inline void columns(const Product& p, i64 m, i64 n, i64 depth) {
  i64 at = 0;
  for (; at + PANEL <= n; at += PANEL) tile<R, COLS>(p, m, at, depth);
  if (COLS > 2 && at + 2 * W <= n) { tile<R, 2>(p, m, at, depth); at += 2 * W; }
  for (; at < n; at += W) tile<R, 1>(p, m, at, depth);
}

void product(const Product& p, i64 rows, i64 n, i64 depth) {
  for (i64 m = 0; m < rows; m += ROWS) switch (least(ROWS, rows - m)) {
      case 6: columns<6>(p, m, n, depth); break;
      case 5: columns<5>(p, m, n, depth); break;
      case 4: columns<4>(p, m, n, depth); break;
      case 3: columns<3>(p, m, n, depth); break;
      case 2: columns<2>(p, m, n, depth); break;
      default: columns<1>(p, m, n, depth);
    }
}

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

// gcc 12 counts up to sizes that no tensor has.
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"

// Rows that `at` gives by their number, `cols` long, turned: out (cols, wide), zeros from `rows` on.
template <class At> inline void turn(At at, i64 rows, i64 cols, float* out, i64 wide) {
  i64 r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float *p = at(r), *q = at(r + 1), *s = at(r + 2), *t = at(r + 3);
    i64 c = 0;
    for (; c + 4 <= cols; c += 4) {
      const four x = *(const four*)(p + c), y = *(const four*)(q + c), z = *(const four*)(s + c);
      const four w = *(const four*)(t + c);
      const four low = __builtin_shufflevector(x, y, 0, 4, 1, 5), high = __builtin_shufflevector(x, y, 2, 6, 3, 7);
      const four low2 = __builtin_shufflevector(z, w, 0, 4, 1, 5), high2 = __builtin_shufflevector(z, w, 2, 6, 3, 7);
      float* o = out + c * wide + r;
      *(four*)o = __builtin_shufflevector(low, low2, 0, 1, 4, 5);
      *(four*)(o + wide) = __builtin_shufflevector(low, low2, 2, 3, 6, 7);
      *(four*)(o + 2 * wide) = __builtin_shufflevector(high, high2, 0, 1, 4, 5);
      *(four*)(o + 3 * wide) = __builtin_shufflevector(high, high2, 2, 3, 6, 7);
    }
    for (; c < cols; c++) {
      float* o = out + c * wide + r;
      o[0] = p[c]; o[1] = q[c]; o[2] = s[c]; o[3] = t[c];
    }
  }
  for (; r < rows; r++) {
    const float* p = at(r);
    float* o = out + r;
    for (i64 c = 0; c < cols; c++, o += wide) *o = p[c];
  }
  if (rows < wide)
    for (i64 c = 0; c < cols; c++) memset(out + c * wide + rows, 0, (wide - rows) * sizeof(float));
}
inline void turn(const float* in, i64 stride, i64 rows, i64 cols, float* out, i64 wide) {
  turn([=](i64 r) { return in + r * stride; }, rows, cols, out, wide);
}

#if LANES == 16
template <class V> inline V turned(V v, int by) {
  return by == 8   ? __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
         : by == 4 ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
         : by == 2 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                   : __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
}
inline float total(vec v) {
  for (int by = 8; by; by /= 2) v += turned(v, by);
  return v[0];
}
inline float highest(vec v) {
  for (int by = 8; by; by /= 2) { const vec x = turned(v, by); v = x > v ? x : v; }
  return v[0];
}
// A bit for each entry above.
inline u64 above(vec v, float floor) { return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(floor), _CMP_GT_OQ); }
#else
inline float total(vec v) {
  float s = 0.0f;
  for (i64 l = 0; l < W; l++) s += v[l];
  return s;
}
inline float highest(vec v) {
  float s = v[0];
  for (i64 l = 1; l < W; l++) s = v[l] > s ? v[l] : s;
  return s;
}
inline u64 above(vec v, float floor) {
  u64 found = 0;
  for (i64 l = 0; l < W; l++) found |= (u64)(v[l] > floor) << l;
  return found;
}
#endif

// The largest entries of a row, of equal ones the first.
struct Largest {
  float value[WAITING];
  int32_t at[WAITING];
  i64 count, wanted;
  float floor;  // nothing that is not above enters any more

  bool before(i64 i, i64 j) const { return value[i] > value[j] || (value[i] == value[j] && at[i] < at[j]); }
  void swap(i64 i, i64 j) {
    const float v = value[i]; value[i] = value[j]; value[j] = v;
    const int32_t a = at[i]; at[i] = at[j]; at[j] = a;
  }
  // Brings the `wanted` largest to the front.
  void thin() {
    i64 low = 0, high = count - 1;
    while (low < high) {
      swap((low + high) / 2, high);
      i64 end = low;
      for (i64 i = low; i < high; i++)
        if (before(i, high)) swap(i, end++);
      swap(end, high);
      if (end == wanted - 1 || end == wanted) break;
      if (end < wanted) low = end + 1; else high = end - 1;
    }
    count = wanted;
    floor = value[0];
    for (i64 i = 1; i < wanted; i++) floor = value[i] < floor ? value[i] : floor;
  }
  inline void offer(float v, i64 where) {
    if (!(v > floor)) return;
    value[count] = v;
    at[count++] = (int32_t)where;
    if (count == WAITING) thin();
  }
};

// What a thread works on.
struct Room {
  float* next;
  i64 used = 0;
  explicit Room(float* memory) : next(memory) {}
  float* take(i64 floats) {
    float* found = next ? next + used : nullptr;
    used += up(floats, 16);
    return found;
  }
};

struct Attend {
  i64 dims, wide, panels, most_keys;
  float *keys, *means, *biases, *zeros;  // where the rest is one key
  float *turned, *scaled, *rows, *values, *rest, *own_keys, *own_values, *own_rows, *own_logits, *own_out;
  float *mass, *sums;
  int32_t *chosen, *order, *first;
  Largest* largest;
  i64 size;
  Attend(const Call& c, float* memory) {
    Room room(memory);
    i64 top = 0;
    for (i64 h = 0; h < c.heads; h++) top = most(top, least(c.topk[h], c.keys));
    dims = up(c.dim, W); wide = up(c.values, W); panels = up(c.keys, PANEL); most_keys = most(up(top + c.key, W), W);
    turned = room.take(panels * c.dim);
    scaled = room.take(TOGETHER * c.dim);
    rows = room.take(TOGETHER * panels);
    values = room.take(DEPTH * wide);
    rest = room.take(TOGETHER * wide);
    own_keys = room.take(c.dim * most_keys);
    own_values = room.take(most_keys * wide);
    own_rows = room.take(ROWS * c.dim);
    own_logits = room.take(ROWS * most_keys);
    own_out = room.take(ROWS * wide);
    keys = room.take(c.key ? DEPTH * dims : 0);
    means = room.take(c.key ? TOGETHER * dims : 0);
    biases = room.take(c.key ? TOGETHER : 0);
    zeros = room.take(c.key ? wide : 0);
    mass = room.take(TOGETHER);
    sums = room.take(TOGETHER);
    chosen = (int32_t*)room.take(TOGETHER * most_keys);
    order = (int32_t*)room.take(c.length);
    first = (int32_t*)room.take(c.clusters + 2);
    largest = (Largest*)room.take(sizeof(Largest) / sizeof(float) + 1);
    size = room.used;
  }
};

// Queries by cluster: `order` lists them, those of cluster j from first[j] to first[j + 1].
void sort(const i64* groups, i64 length, i64 clusters, int32_t* order, int32_t* first) {
  memset(first, 0, (clusters + 2) * sizeof(int32_t));
  for (i64 t = 0; t < length; t++)
    if (groups[t] >= 0) first[groups[t] + 2]++;
  for (i64 j = 1; j < clusters; j++) first[j + 1] += first[j];
  for (i64 t = 0; t < length; t++)
    if (groups[t] >= 0) order[first[groups[t] + 1]++] = (int32_t)t;
}

// Something that at least `wanted` entries are above, but not many more; as the entries of a normal distribution lie.
float floor_for(const float* row, i64 keys, i64 wanted, float top) {
  vec sum = vec{}, squares = vec{};
  ints counted = ints{};
  for (i64 e = 0; e < keys; e += W) {
    const vec x = load(row + e);
    const auto real = x > -1e30f;
    const vec y = real ? x - all(top) : vec{};
    sum += y;
    squares += y * y;
    counted -= (ints)real;
  }
  i64 n = 0;
  for (i64 l = 0; l < W; l++) n += counted[l];
  if (n <= wanted) return -INFINITY;
  const float mean = total(sum) / n, spread = sqrtf(most_of(total(squares) / n - mean * mean, 0.0f));
  float low = -INFINITY, high = top, guess = top + mean + spread * (sqrtf(2.0f * logf((float)n / wanted)) - 0.4f);
  float step = 0.5f * spread;
  for (int turn = 0; turn < 8 && guess < high && guess > low; turn++) {
    ints more = ints{};
    for (i64 e = 0; e < keys; e += W) more -= (ints)(load(row + e) > all(guess));
    i64 found = 0;
    for (i64 l = 0; l < W; l++) found += more[l];
    if (found >= wanted) {
      low = guess;
      if (found <= 2 * wanted + 16) break;
    } else {
      high = guess;
    }
    guess = low > -INFINITY ? 0.5f * (low + high) : guess - step;
    step *= 2.0f;
  }
  return low;
}

// The largest k of a row of logits; returns how many there are (fewer where fewer keys are real). What a large choice
// holds beyond the waiting room is found by more passes, below the last one's least.
i64 choose(const float* row, i64 keys, i64 wanted, Largest& l, int32_t* chosen, float top) {
  i64 found = 0;
  float ceiling = INFINITY;
  i64 last = -1;  // among entries equal to the ceiling, those up to here are chosen already
  do {
    l.count = 0;
    l.wanted = least(wanted - found, WAITING / 2);
    l.floor = found ? -INFINITY : floor_for(row, keys, l.wanted, top);
    for (i64 e = 0; e < keys; e += W)
      for (u64 bits = above(load(row + e), l.floor); bits; bits &= bits - 1) {
        const i64 i = e + __builtin_ctzll(bits);
        if (i < keys && (row[i] < ceiling || (row[i] == ceiling && i > last))) l.offer(row[i], i);
      }
    if (l.count > l.wanted) l.thin();
    if (!l.count) break;
    i64 lowest = 0;
    for (i64 i = 0; i < l.count; i++) {
      chosen[found + i] = l.at[i];
      if (l.before(lowest, i)) lowest = i;
    }
    found += l.count;
    ceiling = l.value[lowest];
    last = l.at[lowest];
  } while (found < wanted);
  return found;
}

// Exponentials of a row in the place of its logits; returns their sum.
float exponentials(float* row, i64 wide, float top) {
  vec sum = vec{};
  for (i64 e = 0; e < wide; e += W) {
    const vec x = load(row + e), y = exponential(x - all(top));
    const vec z = x == -INFINITY ? vec{} : y;  // what is not a number stays one
    store(row + e, z);
    sum += z;
  }
  return total(sum);
}

// Queries [from, to) of the order attend to `count` keys of their own and to the rest of their cluster. With a bias the
// last of these keys is the rest's, and its logits get the bias.
void own_part(const Call& c, const Attend& w, i64 b, i64 h, i64 from, i64 to, i64 count, const float* rest, float mass,
              float cluster_lse, const float* bias) {
  const i64 wide = up(most(count, 1), W), at = b * c.heads + h;
  for (i64 t = from; t < to; t += ROWS) {
    const i64 n = least(ROWS, to - t);
    if (count) {
      for (i64 r = 0; r < n; r++) {
        const float* q = row_of(c.q, b, h, w.order[t + r]);
        if (t + r + ROWS < to) {
          const float* soon = row_of(c.q, b, h, w.order[t + r + ROWS]);
          for (i64 e = 0; e < c.dim; e += 16) __builtin_prefetch(soon + e);
        }
        for (i64 e = 0; e < c.dim; e++) w.own_rows[r * c.dim + e] = c.scale * q[e];
      }
      product({w.own_rows, c.dim, w.own_keys, wide, w.own_logits, wide, false}, n, wide, c.dim);
    }
    for (i64 r = 0; r < n; r++) {
      const i64 query = w.order[t + r];
      float lse = cluster_lse;
      if (count && mass > 0.0f) {
        float *row = w.own_logits + r * wide, top = -INFINITY;
        if (bias) row[count - 1] += *bias;
        for (i64 e = count; e < wide; e++) row[e] = -INFINITY;
        vec high = load(row);
        for (i64 e = W; e < wide; e += W) { const vec x = load(row + e); high = x > high ? x : high; }
        top = highest(high);
        const float sum = exponentials(row, wide, top), by = mass / sum;
        for (i64 e = 0; e < wide; e += W) store(row + e, load(row + e) * all(by));
        lse = top + logf(sum / mass);
      } else if (count) {
        memset(w.own_logits + r * wide, 0, wide * sizeof(float));
      }
      c.lse[at * c.length + query] = lse;
      memcpy(w.own_out + r * w.wide, rest, w.wide * sizeof(float));
    }
    if (count) product({w.own_logits, wide, w.own_values, w.wide, w.own_out, w.wide, true}, n, w.wide, count);
    for (i64 r = 0; r < n; r++)
      memcpy(c.out + ((b * c.length + w.order[t + r]) * c.heads + h) * c.values, w.own_out + r * w.wide,
             c.values * sizeof(float));
  }
}

// Clusters [begin, begin + n): rows of their attention, the chosen keys' weights taken out, times the values.
void shared_part(const Call& c, const Attend& w, i64 b, i64 h, i64 begin, i64 n, i64 topk, i64* counts, float* lse) {
  const bool keyless = c.mask && !memchr(c.mask + b * c.keys, 1, c.keys);
  const float* centres = c.centres + ((b * c.heads + h) * c.clusters + begin) * c.dim;
  for (i64 e = 0; e < n * c.dim; e++) w.scaled[e] = c.scale * centres[e];
  for (i64 e = 0; e < w.panels; e += PANEL)
    product({w.scaled, c.dim, w.turned + e * c.dim, PANEL, w.rows + e, w.panels, false}, n, PANEL, c.dim);
  for (i64 m = 0; m < n; m++) {
    float *row = w.rows + m * w.panels, top = -INFINITY;
    if (c.mask)
      for (i64 e = 0; e < c.keys; e++) row[e] = c.mask[b * c.keys + e] ? row[e] : -INFINITY;
    for (i64 e = c.keys; e < w.panels; e++) row[e] = -INFINITY;
    int32_t* chosen = w.chosen + m * w.most_keys;
    vec high = all(-INFINITY);
    for (i64 e = 0; e < w.panels; e += W) { const vec x = load(row + e); high = x > high ? x : high; }
    top = highest(high);
    counts[m] = topk ? choose(row, c.keys, topk, *w.largest, chosen, top) : 0;
    if (keyless) {
      memset(row, 0, w.panels * sizeof(float));
      w.mass[m] = w.sums[m] = 0.0f;
      if (c.key) w.biases[m] = 0.0f;
      lse[m] = -INFINITY;
      continue;
    }
    const float sum = exponentials(row, w.panels, top);
    float mass = 0.0f;
    for (i64 i = 0; i < counts[m]; i++) { mass += row[chosen[i]]; row[chosen[i]] = 0.0f; }
    lse[m] = top + logf(sum);
    if (c.key) {
      // Of what is left alone: sum less mass would lose its digits.
      vec left = vec{};
      for (i64 e = 0; e < w.panels; e += W) left += load(row + e);
      const float rest = total(left);
      w.mass[m] = 1.0f;
      w.sums[m] = rest == 0.0f ? 0.0f : 1.0f / rest;
      w.biases[m] = top + logf(rest);
    } else {
      w.mass[m] = mass / sum;
      w.sums[m] = 1.0f / sum;
    }
  }
  for (i64 e = 0; e < c.keys; e += DEPTH) {
    const i64 depth = least(DEPTH, c.keys - e);
    for (i64 r = 0; r < depth; r++) copy_row(row_of(c.v, b, h, e + r), c.values, w.values + r * w.wide, w.wide);
    // What masked rows hold must not matter, not even if it is infinite.
    if (c.mask)
      for (i64 r = 0; r < depth; r++)
        if (!c.mask[b * c.keys + e + r]) memset(w.values + r * w.wide, 0, w.wide * sizeof(float));
    product({w.rows + e, w.panels, w.values, w.wide, w.rest, w.wide, e > 0}, n, w.wide, depth);
    if (!c.key) continue;
    for (i64 r = 0; r < depth; r++) copy_row(row_of(c.k, b, h, e + r), c.dim, w.keys + r * w.dims, w.dims);
    if (c.mask)
      for (i64 r = 0; r < depth; r++)
        if (!c.mask[b * c.keys + e + r]) memset(w.keys + r * w.dims, 0, w.dims * sizeof(float));
    product({w.rows + e, w.panels, w.keys, w.dims, w.means, w.dims, e > 0}, n, w.dims, depth);
  }
  for (i64 m = 0; m < n; m++)
    for (i64 e = 0; e < w.wide; e++) w.rest[m * w.wide + e] *= w.sums[m];
  if (!c.key) return;
  for (i64 m = 0; m < n; m++)
    for (i64 e = 0; e < c.dim; e++) {
      float* mean = w.means + m * w.dims + e;
      *mean *= w.sums[m];
      w.biases[m] -= w.scaled[m * c.dim + e] * *mean;
    }
}

void attend_head(const Call& c, i64 b, i64 h, float* memory) {
  const Attend w(c, memory);
  const i64 at = b * c.heads + h, clusters = least(c.used[h], c.clusters), topk = least(c.topk[h], c.keys);
  if (c.key) memset(w.zeros, 0, w.wide * sizeof(float));
  sort(c.groups + at * c.length, c.length, c.clusters, w.order, w.first);
  for (i64 t = 0; t < c.length; t++)
    if (c.groups[at * c.length + t] < 0) {
      memset(c.out + ((b * c.length + t) * c.heads + h) * c.values, 0, c.values * sizeof(float));
      c.lse[at * c.length + t] = -INFINITY;
    }
  for (i64 e = 0; e < c.keys; e += PANEL)
    turn(row_of(c.k, b, h, e), c.k.time, least(PANEL, c.keys - e), c.dim, w.turned + e * c.dim, PANEL);
  i64 counts[TOGETHER];
  float lse[TOGETHER];
  for (i64 begin = 0; begin < clusters; begin += TOGETHER) {
    const i64 n = least(TOGETHER, clusters - begin);
    if (w.first[begin] == w.first[begin + n]) continue;
    shared_part(c, w, b, h, begin, n, topk, counts, lse);
    for (i64 m = 0; m < n; m++) {
      const i64 from = w.first[begin + m], to = w.first[begin + m + 1], count = counts[m];
      if (from == to) continue;
      const bool key = c.key && lse[m] != -INFINITY;  // no rest without any key
      const i64 wide = up(most(count + key, 1), W);
      const int32_t* chosen = w.chosen + m * w.most_keys;
      turn([&](i64 i) { return row_of(c.k, b, h, chosen[i]); }, count, c.dim, w.own_keys, wide);
      for (i64 i = 0; i < count; i++)
        copy_row(row_of(c.v, b, h, chosen[i]), c.values, w.own_values + i * w.wide, w.wide);
      const float* rest = w.rest + m * w.wide;
      if (key) {
        for (i64 e = 0; e < c.dim; e++) w.own_keys[e * wide + count] = w.means[m * w.dims + e];
        memcpy(w.own_values + count * w.wide, rest, w.wide * sizeof(float));
      }
      own_part(c, w, b, h, from, to, count + key, key ? w.zeros : rest, w.mass[m], lse[m],
               key ? w.biases + m : nullptr);
    }
  }
}

struct Lloyd {
  i64 wide;
  float *turned, *half, *sums, *counts, *moved;
  i64 size;
  Lloyd(const Call& c, float* memory) : wide(up(c.clusters, PANEL)) {
    Room room(memory);
    turned = room.take(c.dim * wide);
    half = room.take(wide);
    sums = room.take(c.clusters * c.dim);
    counts = room.take(c.clusters);
    moved = room.take(c.clusters * c.dim);
    size = room.used;
  }
};

// Centres as the right-hand side of products whose largest decides, and what is taken off: half their norms.
void prepare(const Call& c, const Lloyd& w, i64 at, i64 used) {
  float* centres = c.centres + at * c.clusters * c.dim;
  const float* right = centres;
  if (c.metric) {
    memset(w.moved, 0, c.clusters * c.dim * sizeof(float));
    const float* metric = c.metric + at * c.dim * c.dim;
    for (i64 j = 0; j < used; j++)
      for (i64 d = 0; d < c.dim; d++)
        for (i64 e = 0; e < c.dim; e++) w.moved[j * c.dim + e] += centres[j * c.dim + d] * metric[d * c.dim + e];
    right = w.moved;
  }
  for (i64 p = 0; p < w.wide; p += PANEL)
    turn(right + p * c.dim, c.dim, most(0, least(PANEL, used - p)), c.dim, w.turned + p * c.dim, PANEL);
  for (i64 j = 0; j < w.wide; j++) {
    float sum = 0.0f;
    if (j < used && !c.sphere)
      for (i64 e = 0; e < c.dim; e++) sum += centres[j * c.dim + e] * right[j * c.dim + e];
    w.half[j] = j < used ? -0.5f * sum : -INFINITY;
  }
}

// Products of R points with N vectors of centres from p on; keeps the best of each lane and where it was.
template <int R, int N>
inline void compare(const Lloyd& w, const float* points, i64 stride, i64 dim, i64 p, vec* best, ints* place) {
  const float* b = w.turned + p * dim;
  vec acc[R][N];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) acc[r][v] = load(w.half + p + v * W);
  for (i64 k = 0; k < dim; k++) {
    vec right[N];
    for (int v = 0; v < N; v++) right[v] = load(b + k * PANEL + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vec left = all(points[r * stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) acc[r][v] += left * right[v];
    }
  }
  ints lanes;
  for (i64 l = 0; l < W; l++) lanes[l] = (int32_t)l;
  for (int v = 0; v < N; v++) {
    const ints here = lanes + (int32_t)(p + v * W);
    for (int r = 0; r < R; r++) {
      const auto more = acc[r][v] > best[r];
      best[r] = more ? acc[r][v] : best[r];
      place[r] = more ? here : place[r];
    }
  }
}

template <int R> inline void nearest(const Lloyd& w, const float* points, i64 stride, i64 dim, i64 used, i64* groups) {
  vec best[R];
  ints place[R];
  for (int r = 0; r < R; r++) { best[r] = all(-INFINITY); place[r] = ints{}; }
  i64 p = 0;
  for (; p + PANEL < used; p += PANEL) compare<R, COLS>(w, points, stride, dim, p, best, place);
  switch (up(used - p, W) / W) {
    case 1: compare<R, 1>(w, points, stride, dim, p, best, place); break;
    case 2: compare<R, 2>(w, points, stride, dim, p, best, place); break;
    default: compare<R, COLS>(w, points, stride, dim, p, best, place);
  }
  for (int r = 0; r < R; r++) {
#if LANES == 16
    ints first = best[r] == all(highest(best[r])) ? place[r] : ints{} + INT32_MAX;
    for (int by = 8; by; by /= 2) { const ints x = turned(first, by); first = x < first ? x : first; }
    groups[r] = first[0] == INT32_MAX ? 0 : first[0];
#else
    float top = best[r][0];
    int32_t where = place[r][0];
    for (i64 l = 1; l < W; l++)
      if (best[r][l] > top || (best[r][l] == top && place[r][l] < where)) { top = best[r][l]; where = place[r][l]; }
    groups[r] = where;
#endif
  }
}

void assign(const Call& c, const Lloyd& w, i64 b, i64 h, i64 used) {
  i64* groups = c.groups + (b * c.heads + h) * c.length;
  for (i64 t = 0; t < c.length; t += ROWS) {
    const float* points = row_of(c.q, b, h, t);
    if (c.length - t >= ROWS) {
      nearest<ROWS>(w, points, c.q.time, c.dim, used, groups + t);
    } else {
      for (i64 r = t; r < c.length; r++) nearest<1>(w, row_of(c.q, b, h, r), 0, c.dim, used, groups + r);
    }
  }
  if (c.query_mask)
    for (i64 t = 0; t < c.length; t++)
      if (!c.query_mask[b * c.length + t]) groups[t] = -1;
}

void sum_up(const Call& c, float* sums, float* counts, i64 b, i64 h) {
  const i64* groups = c.groups + (b * c.heads + h) * c.length;
  memset(sums, 0, c.clusters * c.dim * sizeof(float));
  memset(counts, 0, c.clusters * sizeof(float));
  for (i64 t = 0; t < c.length; t++) {
    if (groups[t] < 0) continue;
    const float* q = row_of(c.q, b, h, t);
    float* sum = sums + groups[t] * c.dim;
    for (i64 e = 0; e < c.dim; e++) sum[e] += q[e];
    counts[groups[t]] += 1.0f;
  }
}

void lloyd_head(const Call& c, i64 b, i64 h, float* memory) {
  const Lloyd w(c, memory);
  const i64 at = b * c.heads + h, used = least(c.used[h], c.clusters);
  for (i64 step = 0; step < c.iterations; step++) {
    prepare(c, w, at, used);
    assign(c, w, b, h, used);
    if (step + 1 == c.iterations) break;
    sum_up(c, w.sums, w.counts, b, h);
    for (i64 j = 0; j < used; j++) {
      if (w.counts[j] == 0.0f) continue;
      const float* sum = w.sums + j * c.dim;
      float by = 1.0f / w.counts[j], norm = 0.0f;
      if (c.sphere) {
        for (i64 e = 0; e < c.dim; e++) norm += sum[e] * sum[e];
        by = 1.0f / (norm > 1e-24f ? sqrtf(norm) : 1e-12f);
      }
      for (i64 e = 0; e < c.dim; e++) c.centres[(at * c.clusters + j) * c.dim + e] = sum[e] * by;
    }
  }
}

void means_head(const Call& c, i64 b, i64 h, float* memory) {
  const i64 at = b * c.heads + h;
  float* centres = c.centres + at * c.clusters * c.dim;
  sum_up(c, centres, memory, b, h);
  for (i64 j = 0; j < c.clusters; j++)
    for (i64 e = 0; e < c.dim; e++) centres[j * c.dim + e] /= memory[j] > 1.0f ? memory[j] : 1.0f;
}

// Covariance of the real keys. Blocks of keys, centred, times themselves.
void metric_head(const Call& c, i64 b, i64 h, float* memory) {
  const i64 wide = up(c.dim, W);
  float *mean = memory, *rows = mean + wide, *turned = rows + DEPTH * wide, *sum = turned + wide * DEPTH;
  float count = 0.0f;
  memset(mean, 0, wide * sizeof(float));
  const unsigned char* mask = c.mask ? c.mask + b * c.keys : nullptr;
  for (i64 t = 0; t < c.keys; t++) {
    if (mask && !mask[t]) continue;
    const float* key = row_of(c.k, b, h, t);
    for (i64 e = 0; e < c.dim; e++) mean[e] += key[e];
    count += 1.0f;
  }
  const float by = 1.0f / (count > 1.0f ? count : 1.0f);
  for (i64 e = 0; e < wide; e++) mean[e] *= by;
  memset(sum, 0, wide * wide * sizeof(float));
  i64 held = 0;
  for (i64 t = 0; t <= c.keys; t++) {
    if (held == DEPTH || (t == c.keys && held)) {
      turn(rows, wide, held, c.dim, turned, DEPTH);
      product({turned, DEPTH, rows, wide, sum, wide, true}, c.dim, wide, held);
      held = 0;
    }
    if (t == c.keys || (mask && !mask[t])) continue;
    copy_row(row_of(c.k, b, h, t), c.dim, rows + held * wide, wide);
    for (i64 e = 0; e < wide; e += W) store(rows + held * wide + e, load(rows + held * wide + e) - load(mean + e));
    held++;
  }
  float* out = c.metric + (b * c.heads + h) * c.dim * c.dim;
  for (i64 d = 0; d < c.dim; d++)
    for (i64 e = 0; e < c.dim; e++) out[d * c.dim + e] = sum[d * wide + e] * by;
}

#include "hashes.h"

i64 room_of(const Call& c, i64 job) {
  switch (job) {
    case ATTEND: return Attend(c, nullptr).size;
    case LLOYD: return Lloyd(c, nullptr).size;
    case HASHES: return Hashes(c, nullptr).size;
    case MEANS: return up(c.clusters, 16);
    default: {
      const i64 wide = up(c.dim, W);
      return wide + 2 * DEPTH * wide + wide * wide;
    }
  }
}

}  // namespace

#define NAMED_(PART, NAME) PART##_##NAME
#define NAMED(PART, NAME) NAMED_(PART, NAME)
int NAMED(clustered, INSTRUCTIONS)(const Call& c, i64 job) {
  void (*const heads[JOBS])(const Call&, i64, i64, float*) = {
    attend_head, lloyd_head, hashes_head, means_head, metric_head};
  const i64 size = up(room_of(c, job), 16);
  float* memory = c.scratch((size_t)(c.threads * size));
  if (!memory) return 2;
#pragma omp parallel for num_threads((int)c.threads) schedule(dynamic) if (c.threads > 1)
  for (i64 t = 0; t < c.batch * c.heads; t++) heads[job](c, t / c.heads, t % c.heads, memory + THREAD * size);
  return 0;
}
