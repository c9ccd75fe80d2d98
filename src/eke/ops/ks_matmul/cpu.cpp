// Kronecker-sparse products on the CPU, behind a plain C interface: which instructions this machine has, and scratch memory.
#include "common.h"
#include <stdlib.h>

namespace {

// Grows and stays with its thread, so that a call does not fault in fresh pages.
struct Scratch {
  float* memory = nullptr;
  size_t floats = 0;
  ~Scratch() { free(memory); }
  float* at_least(size_t wanted) {
    if (wanted > floats || !memory) {
      free(memory);
      floats = (wanted + 1023) / 1024 * 1024 + 1024;
      memory = (float*)aligned_alloc(64, floats * sizeof(float));
      if (!memory) floats = 0;
    }
    return memory;
  }
};

thread_local Scratch buffer;
float* scratch(size_t floats) { return buffer.at_least(floats); }

}  // namespace

extern "C" {

// 2: AVX-512, 1: AVX2 with fused multiply-add, 0: plain C++.
int eke_ks_level(void) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// factors: for each, applied first to last, a, b, c, d, then the strides of its entries, then their address.
int eke_ks_forward(int level, i64 threads, i64 layout, i64 type, i64 batch, const void* x, i64 x_stride, void* y,
                   i64 y_stride, i64 count, const Factor* factors, const float* bias, i64 relu) {
  Call c = {threads, layout, type, batch, x_stride, y_stride, count, relu, x, y, factors, bias, scratch};
  return level == 2 ? forward_avx512(c) : level == 1 ? forward_avx2(c) : forward_portable(c);
}

int eke_ks_gradient(int level, i64 threads, i64 layout, i64 batch, const float* x, i64 x_stride, const float* g,
                    i64 g_stride, float* w, i64 a, i64 b, i64 c, i64 d) {
  Gradient call = {threads, layout, batch, x_stride, g_stride, x, g, w, {a, b, c, d, b * c * d, c * d, d, 1, nullptr}};
  return level == 2 ? gradient_avx512(call) : level == 1 ? gradient_avx2(call) : gradient_portable(call);
}
}
