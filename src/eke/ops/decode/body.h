// One position of every sample through all layers, with one instruction set:
//   x += out(attention(projections(norm(x)))),  x += down(activation(up(norm(x)))),  then norm and head.
// Few samples: the rows of each matrix are split among the threads, which meet four times a layer. Many: each thread
// takes samples of its own and none waits. Weights are read where the parameters lie: a change of one is seen at once.
#include "heads.h"
namespace {

// What the threads share, and what each has for itself, as offsets into scratch memory.
struct Plan {
  i64 width, inner, heads, scores, x, attended, hidden, gated, own, each;
  explicit Plan(const Step& s) : width(padded(s.width)), inner(padded(s.inner)), heads(padded(s.heads)), scores(0) {
    bool gates = false;
    for (i64 i = 0; i < s.layers; i++) {
      const Layer& l = s.layer[i];
      gates |= l.gated.weight != nullptr;
      const i64 wanted = l.attention == SOFTMAX ? l.filled + 1
                         : l.attention == HYBRID ? l.window + 2 * padded(l.features) + padded(s.width / s.heads)
                                                 : 0;
      if (wanted > scores) scores = wanted;
    }
    scores = padded(scores) + 2 * 16;
    x = 0;
    attended = x + s.batch * width;
    hidden = attended + s.batch * width;
    gated = hidden + s.batch * inner;
    own = gated + (gates ? s.batch * inner : 0);
    // normed, projections, gates, rates for every sample; decay of a head; scores
    each = s.batch * (width + padded(3 * s.width) + width + heads) + width + scores;
  }
};

inline i64 room(const Step& s) {
  const Plan p(s);
  return p.own + s.threads * p.each;
}

struct Team {
  i64 part, parts, from, samples;  // this thread's share of the rows, its samples
};

inline void meet(const Team& t) {
  if (t.parts > 1) {
#pragma omp barrier
  }
}

void attention(const Step& s, const Layer& l, const Plan& p, const Team& t) {
  const i64 n = s.width / s.heads, first = s.heads * t.part / t.parts, last = s.heads * (t.part + 1) / t.parts;
  const i64 wide = padded(3 * s.width);
  float* normal = s.memory + p.own + THREAD * p.each;
  float *rows = normal + t.samples * p.width, *gates = rows + t.samples * wide, *rates = gates + t.samples * p.width;
  float *decay = rates + t.samples * p.heads, *scores = decay + p.width;
  for (i64 b = 0; b < t.samples; b++)
    normed(l.before, s.memory + p.x + (t.from + b) * p.width, s.width, normal + b * p.width);
  // Heads may share keys and values: a thread makes those that its own heads see.
  const i64 shared = s.heads / l.key_heads, low = first / shared, high = (last + shared - 1) / shared;
  float *keys = rows + s.width, *values = keys + l.key_heads * n;
  product({l.query, s.width, normal, p.width, rows, wide, false}, first * n, last * n, t.samples);
  product({l.key, s.width, normal, p.width, keys, wide, false}, low * n, high * n, t.samples);
  product({l.value, s.width, normal, p.width, values, wide, false}, low * n, high * n, t.samples);
  const i64 each = l.decay == BY_FEATURE ? n : 1;
  if (l.decay) product({l.gate, s.width, normal, p.width, gates, p.width, false}, first * each, last * each, t.samples);
  if (l.delta) product({l.rate, s.width, normal, p.width, rates, p.heads, false}, first, last, t.samples);
  for (i64 b = 0; b < t.samples; b++) {
    if (s.cosines) {
      const i64 turn = (t.from + b) * s.rotation_stride;
      for (i64 h = first; h < last; h++) rotate(rows + b * wide + h * n, n, s.cosines + turn, s.sines + turn);
      for (i64 h = low; h < high; h++) rotate(keys + b * wide + h * n, n, s.cosines + turn, s.sines + turn);
    }
    for (i64 h = first; h < last; h++) {
      float *q = rows + b * wide + h * n, *k = keys + b * wide + h / shared * n, *v = values + b * wide + h / shared * n;
      float* out = s.memory + p.attended + (t.from + b) * p.width + h * n;
      if (l.attention == SOFTMAX) {
        const i64 at = (t.from + b) * l.batch_stride + h * l.head_stride;
        memcpy(l.keys + at + l.filled * n, k, n * sizeof(float));
        memcpy(l.values + at + l.filled * n, v, n * sizeof(float));
        i64 start = l.starts ? l.starts[t.from + b] : 0;
        if (l.window && l.filled + 1 - l.window > start) start = l.filled + 1 - l.window;
        start = start < 0 ? 0 : least(start, l.filled);  // the own position is always seen
        attend(q, l.keys + at + start * n, l.values + at + start * n, l.filled + 1 - start, n, scores, out);
        continue;
      }
      const i64 at = (t.from + b) * s.heads + h;
      if (l.attention == HYBRID) {
        hybrid(l, h, t.from + b, at, q, k, v, n, scores, out);
        continue;
      }
      const bool decays = l.decay || l.retention;
      if (decays)
        for (i64 e = 0; e < n; e++)
          decay[e] = l.decay == BY_FEATURE ? slow(gates[b * p.width + h * n + e])
                     : l.decay == BY_HEAD  ? (e ? decay[0] : slow(gates[b * p.width + h]))
                                           : l.retention[h];
      const float rate = l.delta ? 1.0f / (1.0f + expf(-rates[b * p.heads + h])) : 1.0f;
      recur(l, l.memory + at * n * n, l.keys + at * n, q, k, v, decays ? decay : nullptr, rate, n, out);
      normed(l.inside, out, n, out);
    }
  }
}

void run(const Step& s, const Plan& p, const Team& t) {
  auto share = [&](i64 rows, i64 part) {  // whole groups of eight rows
    return least(rows, (rows + 7) / 8 * part / t.parts * 8);
  };
  float* normal = s.memory + p.own + THREAD * p.each;
  float *x = s.memory + p.x + t.from * p.width, *attended = s.memory + p.attended + t.from * p.width;
  float *hidden = s.memory + p.hidden + t.from * p.inner, *gated = s.memory + p.gated + t.from * p.inner;
  if (t.part == 0)
    for (i64 b = 0; b < t.samples; b++) memcpy(x + b * p.width, s.x + (t.from + b) * s.width, s.width * sizeof(float));
  meet(t);
  const i64 from = share(s.width, t.part), to = share(s.width, t.part + 1);
  const i64 low = share(s.inner, t.part), high = share(s.inner, t.part + 1);
  for (i64 i = 0; i < s.layers; i++) {
    const Layer& l = s.layer[i];
    attention(s, l, p, t);
    meet(t);
    if (l.attention == HYBRID && l.window && t.part == 0)  // all heads have seen who left
      for (i64 b = 0; b < t.samples; b++) l.real[(t.from + b) * l.window + l.filled] = 1;
    product({l.out, s.width, attended, p.width, x, p.width, true}, from, to, t.samples);
    meet(t);
    for (i64 b = 0; b < t.samples; b++) normed(l.between, x + b * p.width, s.width, normal + b * p.width);
    product({l.up, s.width, normal, p.width, hidden, p.inner, false}, low, high, t.samples);
    if (l.gated.weight) product({l.gated, s.width, normal, p.width, gated, p.inner, false}, low, high, t.samples);
    for (i64 b = 0; b < t.samples; b++) {
      float *up = hidden + b * p.inner, *gate = gated + b * p.inner;
      activate((l.gated.weight ? gate : up) + low, high - low, s.activation);
      if (l.gated.weight)
        for (i64 e = low; e < high; e++) up[e] *= gate[e];
    }
    meet(t);
    product({l.down, s.inner, hidden, p.inner, x, p.width, true}, from, to, t.samples);
    meet(t);
  }
  for (i64 b = 0; b < t.samples; b++) normed(s.last, x + b * p.width, s.width, normal + b * p.width);
  float* out = s.out + t.from * s.outputs;
  if (s.head.weight)
    product({s.head, s.width, normal, p.width, out, s.outputs, false}, share(s.outputs, t.part),
            share(s.outputs, t.part + 1), t.samples);
  else if (t.part == 0)
    for (i64 b = 0; b < t.samples; b++) memcpy(out + b * s.width, normal + b * p.width, s.width * sizeof(float));
}

inline void step(const Step& s) {
  const Plan p(s);
  const i64 work = s.batch * s.width * (4 * s.width + 2 * s.inner);
  const bool apart = s.batch >= TOGETHER;
  const i64 threads = work < PARALLEL_WORK ? 1 : apart ? least(s.threads, s.batch) : s.threads;
  if (threads == 1) return run(s, p, {0, 1, 0, s.batch});
#pragma omp parallel num_threads(threads)
  {
    // A runtime may give fewer threads than asked for.
#ifdef _OPENMP
    const i64 given = omp_get_num_threads();
#else
    const i64 given = 1;
#endif
    const i64 from = s.batch * THREAD / given;
    run(s, p, apart ? Team{0, 1, from, s.batch * (THREAD + 1) / given - from} : Team{THREAD, given, 0, s.batch});
  }
}

}  // namespace

#define NAME(set) decode_step_##set
#define NAMED(set) NAME(set)
void NAMED(INSTRUCTIONS)(const Step& s) { step(s); }
