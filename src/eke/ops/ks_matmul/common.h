// Shared by the translation units of one library: what a call carries, and the names of the ways to load a row's values.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef double unaligned_double __attribute__((aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))

// d values of a row, spread over the lanes: one value, two, four or eight repeated; whole vectors; repeats that do not
// divide a vector; and the vectors that run over the end of d values and start again.
enum { SET1, TWO, FOUR, EIGHT, PLAIN, PERMUTE, WRAP, KINDS };

// One Kronecker-sparse factor: integers a, b, c, d, strides of its free entries (in floats), and the entries.
struct Factor {
  i64 a, b, c, d, sa, sb, sc, sd;
  const float* w;
};

enum { FLOAT32, BFLOAT16 };
enum { FIRST, LAST };

// y = x K^T through one or more factors; factors[0] is applied first.
struct Call {
  i64 threads, layout, type, batch, x_stride, y_stride, factors, relu;
  const void* x;
  void* y;
  const Factor* factor;
  const float* bias;
  float* (*scratch)(size_t floats);
};

// Gradient of the free entries (contiguous) from x and the gradient g of y, both float32.
struct Gradient {
  i64 threads, layout, batch, x_stride, g_stride;
  const float* x;
  const float* g;
  float* w;
  Factor factor;
};

int forward_avx512(const Call&);
int forward_avx2(const Call&);
int forward_portable(const Call&);
int gradient_avx512(const Gradient&);
int gradient_avx2(const Gradient&);
int gradient_portable(const Gradient&);
