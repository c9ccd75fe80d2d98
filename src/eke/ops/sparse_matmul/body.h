// Sparse products, included once for each instruction set with LANES floats a vector.
//
// A tile of the batch is turned first, so that the samples of one column lie side by side: an entry is then one value
// that is spread over a vector and one multiply-add for LANES samples, whatever column it has.
#include <stdint.h>
#include <string.h>
#include "call.h"

#define JOINED(a, b) a##_##b
#define JOIN(a, b) JOINED(a, b)
// Sums that must not become lanes of one vector: putting four scattered numbers into it costs more than it saves.
#if defined(__x86_64__)
#define APART(sum) __asm__("" : "+x"(sum))
#else
#define APART(sum) (void)0
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr i64 L = LANES;
// Rows whose results are turned back together.
constexpr i64 CHUNK = 16;
// Columns turned by one thread at a time.
constexpr i64 SLICE = 4 * L;
// What of a turned tile stays in the nearest cache, and the entries a row must have in it to be worth its sums' way.
constexpr i64 PANEL_BYTES = 32768, PANEL_ENTRIES = 32;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float* p) { return *(const loose*)p; }
INLINE void store(float* p, vec v) { *(loose*)p = v; }

#if LANES == 16
INLINE vec low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
INLINE vec high(vec a, vec b) { return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
#elif LANES == 8
INLINE vec low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
INLINE vec high(vec a, vec b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
INLINE vec low(vec a, vec b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
INLINE vec high(vec a, vec b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
#endif

// Rows become columns: each round interleaves the first half of the vectors with the second.
INLINE void turn(vec* r) {
#pragma GCC unroll 4
  for (i64 round = 1; round < L; round *= 2) {
    vec t[L];
#pragma GCC unroll 8
    for (i64 i = 0; i < L / 2; i++) {
      t[2 * i] = low(r[i], r[i + L / 2]);
      t[2 * i + 1] = high(r[i], r[i + L / 2]);
    }
#pragma GCC unroll 16
    for (i64 i = 0; i < L; i++) r[i] = t[i];
  }
}

// Lane i of the result is the sum of the lanes of r[i].
INLINE vec sums(vec* r) {
#pragma GCC unroll 4
  for (i64 half = L / 2; half; half /= 2) {
#pragma GCC unroll 8
    for (i64 i = 0; i < half; i++) r[i] = low(r[i], r[i + half]) + high(r[i], r[i + half]);
  }
  return r[0];
}

// to[j * width + n] = from[n * stride + j] for n < rows and j < cols; zeros up to n = width, a multiple of L.
INLINE void turn_in(const float* from, i64 stride, i64 rows, i64 cols, float* to, i64 width) {
  for (i64 n = 0; n < width; n += L) {
    const i64 m = rows - n < L ? (rows > n ? rows - n : 0) : L;
    i64 j = 0;
    if (m == L)
      for (; j + L <= cols; j += L) {
        vec r[L];
#pragma GCC unroll 16
        for (i64 i = 0; i < L; i++) r[i] = load(from + (n + i) * stride + j);
        turn(r);
#pragma GCC unroll 16
        for (i64 i = 0; i < L; i++) store(to + (j + i) * width + n, r[i]);
      }
    for (; j < cols; j++)
      for (i64 i = 0; i < L; i++) to[j * width + n + i] = i < m ? from[(n + i) * stride + j] : 0;
  }
}

// to[n * stride + j] = from[j * width + n] for n < rows and j < cols.
INLINE void turn_out(const float* from, i64 width, i64 rows, i64 cols, float* to, i64 stride) {
  for (i64 n = 0; n < rows; n += L) {
    const i64 m = rows - n < L ? rows - n : L;
    i64 j = 0;
    for (; j + L <= cols; j += L) {
      vec r[L];
#pragma GCC unroll 16
      for (i64 i = 0; i < L; i++) r[i] = load(from + (j + i) * width + n);
      turn(r);
      if (m == L) {
#pragma GCC unroll 16
        for (i64 i = 0; i < L; i++) store(to + (n + i) * stride + j, r[i]);
      } else {
        for (i64 i = 0; i < m; i++) store(to + (n + i) * stride + j, r[i]);
      }
    }
    for (; j < cols; j++)
      for (i64 i = 0; i < m; i++) to[(n + i) * stride + j] = from[j * width + n + i];
  }
}

// How many panels of columns a tile is taken in: as many as let one stay in the nearest cache, if rows have at least
// PANEL_ENTRIES entries in each.
INLINE i64 panels_of(const Call& c, i64 width) {
  const i64 wanted = (c.inputs * width * (i64)sizeof(float) + PANEL_BYTES - 1) / PANEL_BYTES;
  const i64 most = c.starts[c.groups] / (c.groups * PANEL_ENTRIES);
  return wanted < most ? wanted : most < 1 ? 1 : most;
}

// Floats of scratch memory a thread needs: turned x, sums, and a cursor for each row.
INLINE i64 room_of(const Call& c, i64 width) {
  return c.inputs * width + c.groups * c.block * (width + 2) + CHUNK;
}

// R rows with the same columns, V vectors of samples, U entries side by side so that sums do not wait for each other.
// Starts from `out` itself or from the bias; takes entries up to the first group of U with a column from `end` on, all of
// them where `all` is set. Returns the entry after the last one taken.
template <int R, int V, int U>
INLINE i64 rows_times(const Call& c, i64 e, i64 to, i64 end, bool all, const float* x, bool fresh, const float* bias,
                      float* out) {
  const int32_t* columns = c.columns;
  vec sum[U][R][V];
#pragma GCC unroll 8
  for (int u = 0; u < U; u++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[u][r][v] = vec{};
  if (!fresh || bias) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sum[0][r][v] = fresh ? vec{} + bias[r] : load(out + (r * V + v) * L);
  }
  for (; e + U <= to && (all || columns[e + U - 1] < end); e += U)
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      const float* p = x + (i64)columns[e + u] * (V * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const float w = c.values[(e + u) * R + r];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[u][r][v] += w * load(p + v * L);
      }
    }
  if (all)
    for (; e < to; e++) {
      const float* p = x + (i64)columns[e] * (V * L);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const float w = c.values[e * R + r];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[0][r][v] += w * load(p + v * L);
      }
    }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
#pragma GCC unroll 8
      for (int u = 1; u < U; u++) sum[0][r][v] += sum[u][r][v];
      store(out + (r * V + v) * L, sum[0][r][v]);
    }
  return e;
}

// The rows from `first` to `last` of one tile; x is turned. Columns are taken in panels that stay in the nearest cache
// where rows have enough entries for it: `sums` then holds what the panels so far add up to.
template <int R, int V>
void forward_rows(const Call& c, const float* x, float* sums, i64 first, i64 last, i64 n, i64 count) {
  constexpr int U = R * V >= 8 ? 1 : R * V >= 4 ? 2 : R * V >= 2 ? 4 : 8;
  const i64 width = V * L, panels = panels_of(c, width), panel = (c.inputs + panels - 1) / panels;
  i64* cursor = (i64*)(sums + (last - first) * width);
  for (i64 r = 0; r < last - first; r += R) cursor[r / R] = c.starts[(first + r) / R];
  for (i64 k = 0; k < panels; k++)
    for (i64 row = first; row < last; row += CHUNK) {
      const i64 rows = last - row < CHUNK ? last - row : CHUNK;
      float* out = sums + (row - first) * width;
      for (i64 r = 0; r < rows; r += R) {
        i64* e = cursor + (row - first + r) / R;
        *e = rows_times<R, V, U>(c, *e, c.starts[(row + r) / R + 1], (k + 1) * panel, k + 1 == panels, x, !k,
                                 c.bias ? c.bias + row + r : nullptr, out + r * width);
      }
      if (k + 1 == panels) turn_out(out, width, count, rows, c.y + n * c.y_stride + row, c.y_stride);
    }
}

// One sample: nothing is gained by turning it.
template <int R>
void forward_one(const Call& c, i64 first, i64 last) {
  for (i64 row = first; row < last; row += R) {
    const i64 from = c.starts[row / R], to = c.starts[row / R + 1];
    const float* w = c.values + from * R;
    const int32_t* j = c.columns + from;
    const i64 count = to - from;
    float a[R] = {}, b[R] = {}, d[R] = {}, f[R] = {};
    i64 e = 0;
    for (; e + 4 <= count; e += 4) {
      const float p = c.x[j[e]], q = c.x[j[e + 1]], s = c.x[j[e + 2]], t = c.x[j[e + 3]];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        a[r] += w[e * R + r] * p;
        b[r] += w[(e + 1) * R + r] * q;
        d[r] += w[(e + 2) * R + r] * s;
        f[r] += w[(e + 3) * R + r] * t;
      }
      if (R == 1) { APART(a[0]); APART(b[0]); APART(d[0]); APART(f[0]); }
    }
    for (; e < count; e++)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) a[r] += w[e * R + r] * c.x[j[e]];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) c.y[row + r] = (a[r] + b[r]) + (d[r] + f[r]) + (c.bias ? c.bias[row + r] : 0);
  }
}

template <int R, int V>
void forward_tiles(const Call& c, float* memory) {
  const i64 width = V * L, tiles = (c.batch + width - 1) / width, rows = c.groups * R, own = room_of(c, width);
  if (tiles >= 2 * c.threads || c.threads == 1) {
#pragma omp parallel for num_threads(c.threads) schedule(dynamic) if (c.threads > 1)
    for (i64 t = 0; t < tiles; t++) {
      const i64 n = t * width, count = c.batch - n < width ? c.batch - n : width;
      float* x = memory + thread_number() * own;
      turn_in(c.x + n * c.x_stride, c.x_stride, count, c.inputs, x, width);
      forward_rows<R, V>(c, x, x + c.inputs * width, 0, rows, n, count);
    }
    return;
  }
  const i64 share = ((rows + c.threads - 1) / c.threads + CHUNK - 1) / CHUNK * CHUNK;
#pragma omp parallel num_threads(c.threads)
  for (i64 n = 0; n < c.batch; n += width) {
    const i64 count = c.batch - n < width ? c.batch - n : width;
#pragma omp for schedule(static)
    for (i64 j = 0; j < c.inputs; j += SLICE)
      turn_in(c.x + n * c.x_stride + j, c.x_stride, count, c.inputs - j < SLICE ? c.inputs - j : SLICE,
              memory + j * width, width);
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row += share)
      forward_rows<R, V>(c, memory, memory + thread_number() * own + c.inputs * width, row,
                         rows - row < share ? rows : row + share, n, count);
  }
}

// gx = g W: each row of g is added, times its values, to the columns that it has.
template <int R, int V>
void backward_tiles(const Call& c, float* memory) {
  const i64 width = V * L, tiles = (c.batch + width - 1) / width, rows = c.groups * R;
#pragma omp parallel for num_threads(c.threads) schedule(dynamic) if (c.threads > 1)
  for (i64 t = 0; t < tiles; t++) {
    const i64 n = t * width, count = c.batch - n < width ? c.batch - n : width;
    float* x = memory + thread_number() * room_of(c, width);
    memset(x, 0, sizeof(float) * c.inputs * width);
    float in[CHUNK * V * L];
    for (i64 row = 0; row < rows; row += CHUNK) {
      const i64 here = rows - row < CHUNK ? rows - row : CHUNK;
      turn_in(c.y + n * c.y_stride + row, c.y_stride, count, here, in, width);
      for (i64 r = 0; r < here; r += R) {
        vec g[R][V];
        for (int k = 0; k < R; k++)
          for (int v = 0; v < V; v++) g[k][v] = load(in + ((r + k) * V + v) * L);
        for (i64 e = c.starts[(row + r) / R]; e < c.starts[(row + r) / R + 1]; e++) {
          float* p = x + (i64)c.columns[e] * width;
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) {
            vec s = load(p + v * L);
#pragma GCC unroll 8
            for (int k = 0; k < R; k++) s += c.values[e * R + k] * g[k][v];
            store(p + v * L, s);
          }
        }
      }
    }
    turn_out(x, width, count, c.inputs, c.gx + n * c.x_stride, c.x_stride);
  }
}

// The derivative of each value: the product of its row of g with its column of x over the batch.
template <int R, int V>
void gradient_rows(const Call& c, const float* x, i64 first, i64 last, i64 n, i64 count) {
  float in[CHUNK * V * L];
  const i64 rows = last - first;
  turn_in(c.y + n * c.y_stride + first, c.y_stride, count, rows, in, V * L);
  for (i64 r = 0; r < rows; r += R) {
    const i64 from = c.starts[(first + r) / R] * R, to = c.starts[(first + r) / R + 1] * R;
    vec g[R][V];
    for (int k = 0; k < R; k++)
      for (int v = 0; v < V; v++) g[k][v] = load(in + ((r + k) * V + v) * L);
    i64 e = from;
    // R divides L, so that rows and entries of a block follow each other.
    for (; e + L <= to; e += L) {
      vec s[L];
#pragma GCC unroll 16
      for (i64 i = 0; i < L; i++) {
        const float* p = x + (i64)c.columns[(e + i) / R] * (V * L);
        s[i] = g[i % R][0] * load(p);
#pragma GCC unroll 8
        for (int v = 1; v < V; v++) s[i] += g[i % R][v] * load(p + v * L);
      }
      store(c.gv + e, load(c.gv + e) + sums(s));
    }
    for (; e < to; e++) {
      const float* p = x + (i64)c.columns[e / R] * (V * L);
      vec s = g[e % R][0] * load(p);
      for (int v = 1; v < V; v++) s += g[e % R][v] * load(p + v * L);
      float sum = 0;
      for (i64 l = 0; l < L; l++) sum += s[l];
      c.gv[e] += sum;
    }
  }
}

template <int R, int V>
void gradient_tiles(const Call& c, float* memory) {
  const i64 width = V * L, rows = c.groups * R;
#pragma omp parallel num_threads(c.threads) if (c.threads > 1)
  for (i64 n = 0; n < c.batch; n += width) {
    const i64 count = c.batch - n < width ? c.batch - n : width;
#pragma omp for schedule(static)
    for (i64 j = 0; j < c.inputs; j += SLICE)
      turn_in(c.x + n * c.x_stride + j, c.x_stride, count, c.inputs - j < SLICE ? c.inputs - j : SLICE,
              memory + j * width, width);
#pragma omp for schedule(static)
    for (i64 row = 0; row < rows; row += CHUNK)
      gradient_rows<R, V>(c, memory, row, rows - row < CHUNK ? rows : row + CHUNK, n, count);
  }
}

template <int R, int V>
void run(const Call& c, float* memory) {
  if (c.task == FORWARD) forward_tiles<R, V>(c, memory);
  else if (c.task == BACKWARD) backward_tiles<R, V>(c, memory);
  else gradient_tiles<R, V>(c, memory);
}

template <int R>
int with_rows(const Call& c) {
  if (c.task == FORWARD && c.batch == 1) {
    const i64 rows = c.groups * R;
#pragma omp parallel for num_threads(c.threads) schedule(static) if (c.threads > 1)
    for (i64 row = 0; row < rows; row += CHUNK) forward_one<R>(c, row, rows - row < CHUNK ? rows : row + CHUNK);
    return 0;
  }
  const i64 vectors = c.batch <= L ? 1 : c.batch <= 2 * L || WIDEST < 4 ? 2 : 4;
  float* memory = c.scratch((size_t)(c.threads * room_of(c, vectors * L)));
  if (!memory) return NO_MEMORY;
  if (vectors == 1) run<R, 1>(c, memory);
  else if (vectors == 2) run<R, 2>(c, memory);
  else run<R, (WIDEST < 4 ? 2 : 4)>(c, memory);
  return 0;
}

// Whether the pattern stays inside of its arrays: a column beyond the inputs would be read past the end of x.
bool legal(const Call& c) {
  i64 bad = c.starts[0] < 0 || c.starts[c.groups] > c.entries;
  for (i64 g = 0; g < c.groups; g++) bad |= c.starts[g] > c.starts[g + 1];
  if (bad) return false;
  const uint32_t inputs = c.inputs > INT32_MAX ? INT32_MAX : (uint32_t)c.inputs;
  uint32_t beyond = 0;
  for (i64 e = c.starts[0]; e < c.starts[c.groups]; e++) beyond |= (uint32_t)c.columns[e] >= inputs;
  return !beyond;
}

}  // namespace

int JOIN(sparse_run, INSTRUCTIONS)(const Call& c) {
  if (!legal(c)) return NOT_LEGAL;
  if (c.block == 1) return with_rows<1>(c);
  if (c.block == 2) return with_rows<2>(c);
  return with_rows<4>(c);
}
