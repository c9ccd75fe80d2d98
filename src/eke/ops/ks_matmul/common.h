// Shared by the translation units of one library: what a call carries, and the names of the ways to load a row's values.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef double unaligned_double __attribute__((aligned(4), may_alias));
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif
#define INLINE static inline __attribute__((always_inline))

// d values of a row, spread over the lanes: one value, two, four or eight repeated; whole vectors; repeats that do not
// divide a vector; and the vectors that run over the end of d values and start again.
enum { SET1, TWO, FOUR, EIGHT, PLAIN, PERMUTE, WRAP, KINDS };

// One Kronecker-sparse factor: integers a, b, c, d, strides of its free entries (in floats), and the entries.
struct Factor {
  i64 a, b, c, d, sa, sb, sc, sd;
  const float* w;
};

// How a factor is run: entries packed in panels; entries read where they are; whole super-blocks in one vector; all
// entries of sixteen neighbouring groups in registers; several factors with b = c = 2 in one pass.
enum { PACKED, DIRECT, TINY, HELD, BUTTERFLY };

struct Ready {
  Factor f;
  int way;
  const float* packed;
  // A pass of butterflies: distances in lanes and in vectors, in the order in which they are applied.
  i64 lanes, across, lane[4], step[4];
  bool lanes_first, scaled;
};

enum { FLOAT32, BFLOAT16 };
enum { FIRST, LAST };
constexpr i64 LONGEST = 64;
constexpr i64 PARALLEL_WORK = 200000;  // multiply-adds from which threads pay: about 4 microseconds of one core

// y = x K^T through one or more factors; factors[0] is applied first.
struct Call {
  i64 threads, layout, type, batch, x_stride, y_stride, factors, relu, plain;
  const void* x;
  void* y;
  const Factor* factor;
  const float* bias;
  float* (*scratch)(size_t floats);
  const Ready* ready;  // the passes as `pack` left them, or null: factors are packed in the call
  i64 passes;
};

// Gradient of the free entries (contiguous) from x and the gradient g of y, both float32.
struct Gradient {
  i64 threads, layout, batch, x_stride, g_stride;
  const float* x;
  const float* g;
  float* w;
  Factor factor;
  float* (*scratch)(size_t floats);
};

// For each instruction set: floats that the packed entries take, with a line for each thread; packing; the product;
// the gradient of the entries.
#define INSTRUCTION_SET(NAME)                   \
  i64 room_##NAME(const Call&);                 \
  i64 pack_##NAME(const Call&, Ready*, float*); \
  int forward_##NAME(const Call&);              \
  int gradient_##NAME(const Gradient&);
INSTRUCTION_SET(avx512)
INSTRUCTION_SET(avx2)
INSTRUCTION_SET(portable)
#undef INSTRUCTION_SET
