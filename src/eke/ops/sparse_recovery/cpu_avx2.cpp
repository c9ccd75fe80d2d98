// Sparse solutions with AVX2 instructions; cpu.cpp calls them where the machine has them.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define INSTRUCTIONS avx2
#define VECTOR 32
#define TILE 2
#define BLOCK 8
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
