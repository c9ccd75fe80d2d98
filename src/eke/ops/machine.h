// What every kernel asks of its machine: the instructions it has, and scratch memory.
#pragma once
#include <stddef.h>
#include <stdlib.h>

// Without a name inside, so that libraries loaded side by side keep their own.
namespace machine {
namespace {

// 2: AVX-512, 1: AVX2 with fused multiply-add, 0: plain C++.
inline int level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

// Grows and stays with its thread, so that a call does not fault in fresh pages; no larger than the largest call needs,
// so that a checker of memory sees what goes past it.
struct Scratch {
  float* memory = nullptr;
  size_t floats = 0;
  ~Scratch() { free(memory); }
  float* at_least(size_t wanted) {
    if (wanted > floats || !memory) {
      free(memory);
      floats = wanted / 16 * 16 + 16;
      memory = (float*)aligned_alloc(64, floats * sizeof(float));
      if (!memory) floats = 0;
    }
    return memory;
  }
};

// Lines of 64 bytes; null where there is no memory.
inline float* scratch(size_t floats) {
  static thread_local Scratch buffer;
  return buffer.at_least(floats);
}

}  // namespace
}  // namespace machine
