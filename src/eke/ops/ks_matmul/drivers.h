// Forward through a chain of factors, with one instruction set.
namespace {

inline float widen(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float r;
  memcpy(&r, &u, 4);
  return r;
}

inline uint16_t narrow(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}

void widen_rows(const uint16_t* in, i64 in_stride, float* out, i64 out_stride, i64 n, i64 width) {
  for (i64 r = 0; r < n; r++)
    for (i64 e = 0; e < width; e++) out[r * out_stride + e] = widen(in[r * in_stride + e]);
}

void narrow_rows(const float* in, i64 in_stride, uint16_t* out, i64 out_stride, i64 n, i64 width) {
  for (i64 r = 0; r < n; r++)
    for (i64 e = 0; e < width; e++) out[r * out_stride + e] = narrow(in[r * in_stride + e]);
}

// Adds a bias along the row (batch first: one value a column; batch last: one value a row) and clips at zero.
void finish(float* y, i64 stride, i64 n, i64 width, const float* bias, bool by_row, bool relu) {
  for (i64 r = 0; r < n; r++) {
    float* p = y + r * stride;
    if (bias && by_row) for (i64 e = 0; e < width; e++) p[e] += bias[r];
    else if (bias) for (i64 e = 0; e < width; e++) p[e] += bias[e];
    if (relu) for (i64 e = 0; e < width; e++) p[e] = p[e] < 0.0f ? 0.0f : p[e];
  }
}

// Calls task(t, thread) for t < tasks; without threads nothing of OpenMP is touched.
template <class Task> INLINE void share(i64 tasks, i64 threads, Task task) {
  if (threads == 1) {
    for (i64 t = 0; t < tasks; t++) task(t, 0);
    return;
  }
#pragma omp parallel for num_threads((int)threads) schedule(static)
  for (i64 t = 0; t < tasks; t++) task(t, (i64)THREAD);
}

constexpr i64 CACHE = 49152;  // floats of a tile that stay in the second cache (192 KiB)

// Rows that share one reading of the entries: as many as keep their inputs in cache, and few where all entries do.
i64 rows_at_once(const Factor& f, i64 batch, i64 threads) {
  i64 whole = f.a * most(f.b, f.c) * f.d, entries = f.a * f.b * f.c * f.d;
  i64 rows = entries <= CACHE && whole <= 4096 ? CACHE / whole : CACHE / (f.c * (f.d >= W ? W : f.d));
  rows = rows / 24 * 24;
  // As many parts for each thread, of nearly equal height.
  const i64 parts = ceil_div(ceil_div(batch, most(rows, 24)), threads) * threads;
  return ceil_div(batch, parts);
}

// Whether a call's inputs and outputs are beyond the second cache.
inline bool is_cold(const Factor& f, i64 batch) { return batch * f.a * (f.b + f.c) * f.d > 4 * CACHE; }

// Whether its outputs alone fill a good part of the last cache: then they are better written past it, also for a
// reader that follows at once.
inline bool is_far(const Factor& f, i64 batch) { return batch * f.a * f.b * f.d >= 1 << 20; }

void tile_first(const Ready& q, const float* x, i64 xs, float* y, i64 ys, i64 n, bool far) {
  if (q.way == TINY) return tiny_first(q, x, xs, y, ys, n);
  if (q.way == HELD) return held_first(q.f, x, xs, y, ys, n, far);
  for (i64 i = 0; i < q.f.a; i++) block_first(q, i, x, xs, y, ys, n, nullptr, far);
}

// Whether so few tasks leave some threads idle: then each takes a part of the batch.
inline bool uneven(i64 tasks, i64 threads) { return tasks % threads && tasks < 4 * threads; }

void one_first(const Ready& q, const Call& c) {
  const Factor& f = q.f;
  const bool cold = is_cold(f, c.batch), far = is_far(f, c.batch), whole = q.way == TINY || q.way == HELD;
  const i64 chunk = rows_at_once(f, c.batch, whole || uneven(f.a, c.threads) ? c.threads : 1);
  const i64 chunks = ceil_div(c.batch, chunk), parts = whole ? 1 : f.a, tasks = chunks * parts;
  const float* x = (const float*)c.x;
  float* y = (float*)c.y;
  share(tasks, c.threads, [&](i64 t, i64) {
    i64 n = t / parts * chunk, i = t % parts, rows = least(chunk, c.batch - n);
    const float* at = x + n * c.x_stride;
    if (whole) {
      tile_first(q, at, c.x_stride, y + n * c.y_stride, c.y_stride, rows, far);
    } else {
      const float* next = i + 1 < f.a ? at + f.c * f.d : n + 2 * chunk <= c.batch ? x + (n + chunk) * c.x_stride : x;
      block_first(q, i, at, c.x_stride, y + n * c.y_stride, c.y_stride, rows, cold ? next : nullptr, far);
    }
  });
}

void one_last(const Ready& q, const Call& c) {
  const Factor& f = q.f;
  const bool cold = is_cold(f, c.batch), far = is_far(f, c.batch);
  i64 chunk = most(COLS * W, CACHE / 2 / (f.b + f.c) / (COLS * W) * (COLS * W));
  if (uneven(f.a * f.d, c.threads)) chunk = least(chunk, ceil_div(ceil_div(c.batch, c.threads), W) * W);
  const i64 chunks = ceil_div(c.batch, chunk), tasks = chunks * f.a * f.d;
  const float* x = (const float*)c.x;
  float* y = (float*)c.y;
  share(tasks, c.threads, [&](i64 t, i64) {
    i64 n = t % chunks * chunk, i = t / chunks / f.d, j = t / chunks % f.d;
    group_last(q, i, j, x + n, c.x_stride, y + n, c.y_stride, least(chunk, c.batch - n), cold, far);
  });
}

void tile_last(const Ready& q, const float* x, i64 xs, float* y, i64 ys, i64 n, bool far) {
  for (i64 i = 0; i < q.f.a; i++)
    for (i64 j = 0; j < q.f.d; j++) group_last(q, i, j, x, xs, y, ys, n, false, far);
}

// A tile of the batch through all passes, between two scratch buffers, with a bias and a clip at the end. next: the
// rows that this thread takes afterwards. False where a pass of butterflies gave what is not finite.
bool through(const Call& c, const Ready* q, i64 passes, i64 n, i64 count, i64 next, float* left, float* right,
             i64 widest) {
  const bool last = c.layout == LAST, wide = c.type == FLOAT32;
  const i64 in = q[0].f.a * q[0].f.c * q[0].f.d, end = passes - 1, out = q[end].f.a * q[end].f.b * q[end].f.d;
  const i64 inner = last ? count : widest;
  const bool far = !c.bias && !c.relu && is_far(q[end].f, c.batch);
  const float* from = (const float*)c.x + (last ? n : n * c.x_stride);
  i64 from_stride = c.x_stride;
  if (!wide) {
    const uint16_t* x = (const uint16_t*)c.x + (last ? n : n * c.x_stride);
    widen_rows(x, c.x_stride, left, inner, last ? in : count, last ? count : in);
    from = left;
    from_stride = inner;
  }
  float* free = wide ? left : right;
  // The inputs of the next tile travel while this one is worked on.
  Ahead ahead = {(const float*)c.x + (n + count) * c.x_stride, c.x_stride, far && !last && wide ? next : 0, 0, passes};
  bool fine = true;
  for (i64 s = 0; s <= end; s++, ahead.part++) {
    bool direct = s == end && wide;
    float* to = direct ? (float*)c.y + (last ? n : n * c.y_stride) : free;
    i64 to_stride = direct ? c.y_stride : inner;
    if (q[s].way == BUTTERFLY) {
      fine = butterfly_first(q[s], from, from_stride, to, to_stride, count, direct && far, ahead) && fine;
    } else {
      for (i64 r = ahead.part; r < ahead.rows; r += passes)
        for (i64 e = 0; e < in; e += 16) __builtin_prefetch(ahead.x + r * c.x_stride + e, 0, 2);
      (last ? tile_last : tile_first)(q[s], from, from_stride, to, to_stride, count, direct && far);
    }
    from = to;
    from_stride = to_stride;
    free = to == left ? right : left;
  }
  const i64 height = last ? out : count, width = last ? count : out;
  if (c.bias || c.relu) finish((float*)from, from_stride, height, width, c.bias, last, c.relu);
  if (!wide) {
    uint16_t* y = (uint16_t*)c.y + (last ? n : n * c.y_stride);
    narrow_rows(from, from_stride, y, c.y_stride, height, width);
  }
  return fine;
}

bool many(const Call& c, const Ready* q, i64 passes, float* scratch, i64 widest, i64 chunk) {
  // As many tiles for each thread, of nearly equal height.
  i64 tiles = ceil_div(c.batch, chunk);
  if (c.layout == FIRST) {
    tiles = ceil_div(tiles, c.threads) * c.threads;
    chunk = ceil_div(c.batch, tiles);
    tiles = ceil_div(c.batch, chunk);
  }
  const i64 size = chunk * widest, each = ceil_div(tiles, c.threads);
  int wrong = 0;
  share(c.threads, c.threads, [&](i64 t, i64 thread) {
    float* mine = scratch + 2 * size * thread;
    const i64 end = least((t + 1) * each * chunk, c.batch);
    for (i64 n = t * each * chunk; n < end; n += chunk) {
      const i64 count = least(chunk, end - n);
      if (!through(c, q, passes, n, count, least(chunk, end - n - count), mine, mine + size, widest))
        __atomic_store_n(&wrong, 1, __ATOMIC_RELAXED);
    }
  });
  return !wrong;
}

i64 line_of(const Call& c) {
  i64 line = 0;
  for (i64 s = 0; s < c.factors; s++) line = most(line, c.factor[s].b * c.factor[s].d + 2 * W);
  return ceil_div(line, 16) * 16;
}

// Whether the next factors are tried as butterflies, and how many.
i64 butterflies(const Call& c, i64 s) {
  return c.layout == LAST || c.plain ? 0 : run_of(c.factor + s, c.factors - s);
}

i64 plain_room(const Call& c, i64 s) { return ceil_div((i64)packed_size(c.factor[s], (int)c.layout), 16) * 16; }

i64 room(const Call& c) {
  i64 packed = line_of(c) * c.threads;
  for (i64 s = 0; s < c.factors; s++) {
    const i64 run = butterflies(c, s), width = c.factor[s].a * 2 * c.factor[s].d;
    i64 plain = plain_room(c, s);
    for (i64 e = 1; e < run; e++) plain += plain_room(c, s + e);
    packed += run ? most(plain, width * (run + 3)) : plain;
    if (run) s += run - 1;
  }
  return packed;
}

void pack_plain(const Call& c, const Factor& f, Ready& ready, float* at, float* lines) {
  const i64 line = line_of(c), size = (i64)packed_size(f, (int)c.layout);
  const bool last = c.layout == LAST;
  const bool held = last ? is_held_last(f) : is_held(f), tiny = !last && is_tiny(f);
  ready = Ready{f, tiny ? TINY : held ? HELD : size ? PACKED : DIRECT, at, 0, 0, {0}, {0}, false, false};
  if (ready.way == TINY) return pack_tiny(f, at);
  if (ready.way != PACKED) return;
  share(f.a, size > 65536 ? c.threads : 1, [&](i64 i, i64 thread) {
    if (last) pack_last(f, i, at);
    else pack_first(f, i, at, lines + line * thread);
  });
}

i64 pack(const Call& c, Ready* ready, float* scratch) {
  float* at = scratch + line_of(c) * c.threads;
  i64 passes = 0;
  for (i64 s = 0; s < c.factors;) {
    const i64 run = butterflies(c, s);
    i64 taken = 0;
    if (run) {
      const i64 width = c.factor[s].a * 2 * c.factor[s].d;
      taken = pack_butterfly(c.factor + s, run, ready + passes, at, (double*)(at + width * (run + 1)));
      if (taken) at += width * (run + 1);
    }
    passes += taken;
    if (taken) s += run;
    else
      for (const i64 end = s + most(run, 1); s < end; s++) {
        pack_plain(c, c.factor[s], ready[passes++], at, scratch);
        at += plain_room(c, s);
      }
  }
  return passes;
}

// 2: no memory; 3: outputs that are not finite, which the plain product may not have.
int forward(const Call& c) {
  const bool single = c.factors == 1 && c.type == FLOAT32 && !c.bias && !c.relu;
  i64 widest = 0, entries = 0;
  for (i64 s = 0; s < c.factors; s++) {
    const Factor& f = c.factor[s];
    widest = most(widest, most(f.b, f.c) * f.a * f.d);
    entries += f.a * f.b * f.c * f.d;
  }
  // Rows of a power of two floats would meet in the same lines of the cache.
  widest = ceil_div(widest, 16) * 16 + 16;
  i64 chunk = c.layout == LAST ? COLS * W : entries <= CACHE ? 12 : 96;
  while (c.layout == LAST ? 2 * chunk * widest <= CACHE : 2 * chunk * widest <= CACHE / 2) chunk *= 2;
  chunk = least(chunk, c.layout == LAST ? ceil_div(c.batch, W) * W : c.batch);
  const i64 packed = c.ready ? 0 : room(c), tiles = single ? 0 : 2 * chunk * widest * c.threads;
  float* scratch = packed + tiles ? c.scratch((size_t)(packed + tiles)) : nullptr;
  if (packed + tiles && !scratch) return 2;
  Ready own[LONGEST];
  const i64 passes = c.ready ? c.passes : pack(c, own, scratch);
  const Ready* ready = c.ready ? c.ready : own;
  if (!single) return many(c, ready, passes, scratch + packed, widest, chunk) ? 0 : 3;
  (c.layout == LAST ? one_last : one_first)(ready[0], c);
  return 0;
}

}  // namespace
