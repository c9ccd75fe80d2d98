// Kronecker-sparse products with avx2 instructions; cpu.cpp calls it where the machine has them.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include "vector_avx2.h"
#include "tiles.h"
#include "factors.h"
#include "drivers.h"

int forward_avx2(const Call& c) { return forward(c); }
int gradient_avx2(const Gradient& c) { return gradient(c); }
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
int forward_avx2(const Call&) { return 3; }
int gradient_avx2(const Gradient&) { return 3; }
#endif
