// Kronecker-sparse products with AVX2 instructions; cpu.cpp calls them where the machine has them.
#include "common.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define INSTRUCTIONS avx2
#include "vector_avx2.h"
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
