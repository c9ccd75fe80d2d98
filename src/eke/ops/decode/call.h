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
enum { IDENTITY, ELU, RELU, T2R, HEDGEHOG };
enum { GELU, GELU_TANH, CLIP, SILU };
enum { LINEAR, SOFTMAX, HYBRID };
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
  i64 attention, map, normalize, delta, decay, window, features, key_heads;
  Norm before, between, inside;  // before the attention, before the feed-forward part, of each head's output
  // Where `gated` is not null, activation(gated(x)) times up(x) goes down.
  Matrix query, key, value, out, up, down, gated, gate, rate;
  Matrix query_map, key_map;  // T2R: (heads, size, features) with bias; Hedgehog: (heads, size, size)
  const float *retention, *balance;  // factor of each head, or null; log of what far keys weigh
  // Linear: the state S (batch, heads, features, size) and the sum of keys (batch, heads, features).
  // Softmax: keys and values (batch, heads, capacity, size), of which `filled` positions were read before.
  // Hybrid: the linear state, and near keys and values (batch, heads, window, size) as a ring: `filled` is the slot whose
  // key leaves, `real` (batch, window) says which slots hold a position.
  float *memory, *keys, *values, *near_keys, *near_values;
  i64 batch_stride, head_stride, filled;
  const i64* starts;  // first real position of each sample, or null
  unsigned char* real;
};

struct Step {
  i64 threads, batch, width, heads, inner, activation, layers, outputs;
  const Layer* layer;
  Norm last;
  Matrix head;  // null weight: the outputs are the normed activations
  const float *cosines, *sines;  // of the rotation of queries and keys, (size) for each sample, or null
  i64 rotation_stride;  // 0: all samples stand at one position
  const float* x;
  float* out;
  float* memory;  // scratch, of room() floats
};
