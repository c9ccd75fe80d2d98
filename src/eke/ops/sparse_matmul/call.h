// One call of the sparse products, as every instruction set takes it.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

typedef int64_t i64;

constexpr int NOT_LEGAL = 1, NO_MEMORY = 2;
enum Task { FORWARD, BACKWARD, GRADIENT };

struct Call {
  Task task;
  int threads;
  // x (batch, inputs), y (batch, groups * block); a group is `block` rows with the same columns.
  i64 batch, inputs, groups, block, entries;
  const float* x;
  i64 x_stride;
  const float *values, *bias;
  const int32_t* columns;
  const i64* starts;
  // Written by FORWARD, read by the others.
  float* y;
  i64 y_stride;
  // Derivatives of x (with x_stride) and of the values.
  float *gx, *gv;
  float* (*scratch)(size_t floats);
};

static inline i64 thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}
