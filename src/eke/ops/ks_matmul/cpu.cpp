// Kronecker-sparse products on the CPU, behind a plain C interface: which instructions this machine has, scratch memory,
// and factors that are packed once and kept for as long as their entries do not change.
#include "common.h"
#include "../machine.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

struct Set {
  i64 (*room)(const Call&);
  i64 (*pack)(const Call&, Ready*, float*);
  int (*forward)(const Call&);
  int (*gradient)(const Gradient&);
};
const Set SETS[] = {
    {room_portable, pack_portable, forward_portable, gradient_portable},
#if defined(__x86_64__)
    {room_avx2, pack_avx2, forward_avx2, gradient_avx2},
    {room_avx512, pack_avx512, forward_avx512, gradient_avx512},
#endif
};

// A sum of bytes that any change alters: each step is one to one in what came before and in what comes in, and not
// linear, so that neither flipped signs nor exchanged rows cancel.
struct Sum { uint64_t left, right; };

Sum sum_portable(const unsigned char* p, size_t bytes) {
  uint64_t lanes[4] = {1, 2, 3, 4}, part;
  for (size_t e = 0; e < bytes; e += 8) {
    part = 0;
    memcpy(&part, p + e, bytes - e < 8 ? bytes - e : 8);
    uint64_t v = (lanes[e / 8 % 4] ^ part) * 0x9e3779b97f4a7c15ull;
    lanes[e / 8 % 4] = v << 29 | v >> 35;
  }
  return Sum{lanes[0] ^ (lanes[1] << 17 | lanes[1] >> 47), lanes[2] ^ (lanes[3] << 17 | lanes[3] >> 47)};
}

#if defined(__x86_64__)
__attribute__((target("aes,sse2"))) Sum sum_aes(const unsigned char* p, size_t bytes) {
  __m128i lanes[8];
  for (int e = 0; e < 8; e++) lanes[e] = _mm_set1_epi32(e + 1);
  size_t at = 0;
  for (; at + 128 <= bytes; at += 128)
#pragma GCC unroll 8
    for (int e = 0; e < 8; e++) lanes[e] = _mm_aesenc_si128(lanes[e], _mm_loadu_si128((const __m128i*)(p + at + 16 * e)));
  for (int e = 0; at < bytes; at += 16, e++) {
    unsigned char rest[16] = {0};
    memcpy(rest, p + at, bytes - at < 16 ? bytes - at : 16);
    lanes[e] = _mm_aesenc_si128(lanes[e], _mm_loadu_si128((const __m128i*)rest));
  }
  for (int e = 1; e < 8; e++) lanes[0] = _mm_aesenc_si128(lanes[0], lanes[e]);
  Sum s;
  memcpy(&s, &lanes[0], 16);
  return s;
}
#endif

Sum sum_of(const unsigned char* p, size_t bytes) {
#if defined(__x86_64__)
  static const bool aes = __builtin_cpu_supports("aes");
  if (aes) return sum_aes(p, bytes);
#endif
  return sum_portable(p, bytes);
}

struct Source { const unsigned char* entries; i64 bytes; };

struct Kept {
  int level;
  i64 width_in, width_out, sources;
  Call call;
  Factor factor[LONGEST];
  Ready ready[LONGEST];
  Source source[LONGEST];
  Sum sum[LONGEST];
  float* memory;
};

i64 threads_for(const Factor* f, i64 count, i64 batch, i64 threads) {
  i64 work = 0;
  for (i64 s = 0; s < count; s++) work += f[s].a * f[s].b * f[s].c * f[s].d;
  return batch * work >= PARALLEL_WORK ? threads : 1;
}

// Outputs that are not finite are computed again plainly, which may keep them so.
int forward(int level, Call c) {
  const int status = SETS[level].forward(c);
  if (status != 3) return status;
  c.plain = 1;
  c.ready = nullptr;
  return SETS[level].forward(c);
}

}  // namespace

extern "C" {

// 2: AVX-512, 1: AVX2 with fused multiply-add, 0: plain C++.
int eke_ks_level(void) { return machine::level(); }

// factors: for each, applied first to last, a, b, c, d, then the strides of its entries, then their address.
int eke_ks_forward(int level, i64 threads, i64 layout, i64 type, i64 batch, const void* x, i64 x_stride, void* y,
                   i64 y_stride, i64 count, const Factor* factors, const float* bias, i64 relu) {
  if (count < 1 || count > LONGEST) return 1;
  Call c = {threads_for(factors, count, batch, threads), layout, type, batch, x_stride, y_stride, count, relu, 0, x, y,
            factors, bias, machine::scratch, nullptr, 0};
  return forward(level, c);
}

// Packs factors for later calls. sources: address and bytes of the entries they were made from, which are watched.
// Returns null where memory cannot be had.
void* eke_ks_keep(int level, i64 threads, i64 layout, i64 type, i64 count, const Factor* factors, i64 relu, i64 sources,
                  const Source* source) {
  if (count < 1 || count > LONGEST || sources > LONGEST) return nullptr;
  Kept* k = (Kept*)malloc(sizeof(Kept));
  if (!k) return nullptr;
  memcpy(k->factor, factors, count * sizeof(Factor));
  memcpy(k->source, source, sources * sizeof(Source));
  k->level = level;
  k->sources = sources;
  k->call = {threads, layout, type, 0, 0, 0, count, relu, 0, nullptr, nullptr, k->factor, nullptr, machine::scratch,
             nullptr, 0};
  const Factor &in = factors[0], &out = factors[count - 1];
  k->width_in = in.a * in.c * in.d;
  k->width_out = out.a * out.b * out.d;
  const i64 floats = (SETS[level].room(k->call) + 15) / 16 * 16;
  k->memory = (float*)aligned_alloc(64, (floats ? floats : 16) * sizeof(float));
  if (!k->memory) { free(k); return nullptr; }
  // First the sums: a change while entries are packed is found by the first call.
  for (i64 s = 0; s < sources; s++) k->sum[s] = sum_of(source[s].entries, source[s].bytes);
  k->call.passes = SETS[level].pack(k->call, k->ready, k->memory);
  k->call.ready = k->ready;
  return k;
}

void eke_ks_drop(void* kept) {
  free(((Kept*)kept)->memory);
  free(kept);
}

// The product of kept factors with contiguous x, with as many threads as they were packed for. Returns -1, and computes nothing, if their entries have changed.
int eke_ks_kept(const void* kept, i64 batch, const void* x, void* y, const float* bias) {
  const Kept* k = (const Kept*)kept;
  for (i64 s = 0; s < k->sources; s++) {
    Sum now = sum_of(k->source[s].entries, k->source[s].bytes);
    if (now.left != k->sum[s].left || now.right != k->sum[s].right) return -1;
  }
  Call c = k->call;
  c.threads = threads_for(k->factor, c.factors, batch, c.threads);
  c.batch = batch;
  c.x_stride = c.layout == LAST ? batch : k->width_in;
  c.y_stride = c.layout == LAST ? batch : k->width_out;
  c.x = x;
  c.y = y;
  c.bias = bias;
  return forward(k->level, c);
}

int eke_ks_gradient(int level, i64 threads, i64 layout, i64 batch, const float* x, i64 x_stride, const float* g,
                    i64 g_stride, float* w, i64 a, i64 b, i64 c, i64 d) {
  const Factor f = {a, b, c, d, b * c * d, c * d, d, 1, nullptr};
  Gradient call = {threads_for(&f, 1, batch, threads), layout, batch, x_stride, g_stride, x, g, w, f, machine::scratch};
  return SETS[level].gradient(call);
}
}
