// Clustered attention with AVX2 instructions; cpu.cpp calls it where the machine has them.
#if defined(__x86_64__)
#include "call.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,popcnt")
#endif
#define INSTRUCTIONS avx2
#define LANES 8
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
