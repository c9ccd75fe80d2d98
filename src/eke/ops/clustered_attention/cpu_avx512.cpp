// Clustered attention with AVX-512 instructions; cpu.cpp calls it where the machine has them.
#if defined(__x86_64__)
#include "call.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,popcnt")
#endif
#define INSTRUCTIONS avx512
#define LANES 16
#include "body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
