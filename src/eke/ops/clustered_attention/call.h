// What calls of clustered attention carry: shared by the translation units of the library.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int64_t i64;
typedef uint64_t u64;
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

// Rows of floats of one head: address of batch 0, head 0, position 0, and strides in floats.
struct Rows {
  const float* at;
  i64 batch, head, time;
};

// The parts that a job does not use are null. Arrays without strides are contiguous, (batch, heads, ...).
struct Call {
  i64 threads, batch, heads, length, keys, dim, values, clusters, iterations, sphere;
  i64 key;  // whether ATTEND takes the keys that were not chosen as one more key of their cluster
  float scale;
  Rows q, k, v;
  const i64* used;  // clusters of each head
  const i64* topk;  // of each head
  const unsigned char *mask, *query_mask;  // (batch, keys), (batch, length), or null
  float* centres;  // (clusters, dim): read by ATTEND and MEANS' result; start and scratch of LLOYD
  i64* groups;     // (length): read by ATTEND and MEANS, result of LLOYD and HASHES
  float* out;      // (batch, length, heads, values)
  float* lse;      // (length)
  float* metric;   // (dim, dim): result of METRIC, read by LLOYD
  const float *planes, *thresholds;  // (64, dim), (64)
  u64* starts;                       // hashes of the centres, (clusters); null for those of `first`
  const i64* first;                  // positions of the centres, (clusters)
  float* (*scratch)(size_t floats);
};

// ATTEND: out and lse. LLOYD: groups by k-means. HASHES: groups by k-means on hashes. MEANS: centres of groups.
// METRIC: covariance of the keys.
enum Job { ATTEND, LLOYD, HASHES, MEANS, METRIC, JOBS };
