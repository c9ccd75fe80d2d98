// Kronecker-sparse products with avx512 instructions; cpu.cpp calls it where the machine has them.
#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c")
#endif
#include "vector_avx512.h"
#include "tiles.h"
#include "factors.h"
#include "drivers.h"

int forward_avx512(const Call& c) { return forward(c); }
int gradient_avx512(const Gradient& c) { return gradient(c); }
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
int forward_avx512(const Call&) { return 3; }
int gradient_avx512(const Gradient&) { return 3; }
#endif
