// What a call of causal linear attention carries: shared by the translation units of the library.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

enum { IDENTITY, ELU };

// Rows of `size` floats of one head: address of batch 0, head 0, position 0, and strides in floats.
struct Rows {
  const float* at;
  i64 batch, head, time;
};

// Contiguous outputs: out and its like (batch, length, heads, size), denominators (batch, heads, length), states
// (batch, heads, D, M) and (batch, heads, D).
struct Call {
  i64 threads, batch, heads, length, features, values, map, normalize;
  Rows q, k, v;
  const float *memory, *keys;  // before
  float *out, *bottom, *last_memory, *last_keys;
  float* (*scratch)(size_t floats);
  // Derivatives: of out, of the last state; the results.
  Rows grad;
  const float *grad_memory, *grad_keys;
  float *dq, *dk, *dv, *dmemory, *dkeys;
};
