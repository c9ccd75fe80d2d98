// What one step of decoding carries: shared by the translation units of the library.
#pragma once
#include <math.h>
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

enum { NO_NORM, LAYER_NORM, RMS_NORM };
enum { IDENTITY, ELU, RELU };
enum { GELU, GELU_TANH, CLIP, SILU };
enum { LINEAR, SOFTMAX };
enum { NO_DECAY, BY_HEAD, BY_FEATURE };

// (rows, columns), row after row, read where the parameters lie; bias may be null.
struct Matrix {
  const float *weight, *bias;
};

// weight and bias may be null.
struct Norm {
  i64 kind;
  double eps;
  const float *weight, *bias;
};

struct Layer {
  i64 attention, map, normalize, delta, decay, window;
  Norm before, between, inside;  // before the attention, before the feed-forward part, of each head's output
  Matrix projections, out, up, down, gate, rate;
  const float* retention;  // factor of each head, or null
  // Linear: the state S (batch, heads, size, size) and the sum of keys (batch, heads, size).
  // Softmax: keys and values (batch, heads, capacity, size), of which `filled` positions were read before.
  float *memory, *keys, *values;
  i64 batch_stride, head_stride, filled;
  const i64* starts;  // first real position of each sample, or null
};

struct Step {
  i64 threads, batch, width, heads, inner, activation, layers, outputs;
  const Layer* layer;
  Norm last;
  Matrix head;  // null weight: the outputs are the normed activations
  const float* x;
  float* out;
  float* memory;  // scratch, of room() floats
};
