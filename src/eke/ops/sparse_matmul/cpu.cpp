// Sparse products on the CPU, behind a plain C interface: which instructions this machine has, and scratch memory.
#define INSTRUCTIONS portable
#define LANES 4
#define WIDEST 2
#include "body.h"
#include "../machine.h"

#if defined(__x86_64__)
int sparse_run_avx2(const Call& c);
int sparse_run_avx512(const Call& c);
#endif

namespace {

// Multiply-adds below which threads cost more than they save.
constexpr i64 PARALLEL_WORK = 1 << 18;

// Samples up to which vectors of eight are faster than vectors of sixteen.
constexpr i64 SHORT = 8;

int run(int level, Call& c) {
  c.scratch = machine::scratch;
  const i64 work = c.entries * c.block * c.batch;
  if (work < PARALLEL_WORK || c.threads < 1) c.threads = 1;
#if defined(__x86_64__)
  // Few samples fill a short vector, and half of the turned inputs stay nearer.
  if (level > 1 && (c.batch == 1 || c.batch > SHORT)) return sparse_run_avx512(c);
  if (level > 0) return sparse_run_avx2(c);
#endif
  (void)level;
  return sparse_run_portable(c);
}

}  // namespace

extern "C" {

// 2: AVX-512, 1: AVX2 with fused multiply-add, 0: plain C++.
int eke_sparse_level(void) { return machine::level(); }

// y = x W^T + bias. values and columns have `entries` entries of `block` rows
// (1, 2 or 4) each. All three return 0, 1 where the pattern leaves its arrays, or 2 where there was no memory.
int eke_sparse_forward(int level, int threads, i64 batch, i64 inputs, i64 groups, i64 block, i64 entries, const float* x,
                       i64 x_stride, const float* values, const int32_t* columns, const i64* starts, const float* bias,
                       float* y, i64 y_stride) {
  Call c = {FORWARD, threads, batch, inputs, groups, block, entries, x, x_stride, values, bias, columns, starts, y, y_stride,
            nullptr, nullptr, nullptr};
  return run(level, c);
}

// gx = g W.
int eke_sparse_backward(int level, int threads, i64 batch, i64 inputs, i64 groups, i64 block, i64 entries, const float* g,
                        i64 g_stride, const float* values, const int32_t* columns, const i64* starts, float* gx,
                        i64 gx_stride) {
  Call c = {BACKWARD, threads, batch, inputs, groups, block, entries, nullptr, gx_stride, values, nullptr, columns, starts,
            (float*)g, g_stride, gx, nullptr, nullptr};
  return run(level, c);
}

// gv[e] += <g of its row, x of its column>.
int eke_sparse_gradient(int level, int threads, i64 batch, i64 inputs, i64 groups, i64 block, i64 entries, const float* x,
                        i64 x_stride, const float* g, i64 g_stride, const int32_t* columns, const i64* starts,
                        float* gv) {
  Call c = {GRADIENT, threads, batch, inputs, groups, block, entries, x, x_stride, nullptr, nullptr, columns, starts, (float*)g,
            g_stride, nullptr, gv, nullptr};
  return run(level, c);
}
}
