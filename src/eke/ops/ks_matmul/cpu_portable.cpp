// Kronecker-sparse products with plain C++ instructions; cpu.cpp calls it where the machine has them.
#include "common.h"
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#include "vector_portable.h"
#include "tiles.h"
#include "factors.h"
#include "drivers.h"

int forward_portable(const Call& c) { return forward(c); }
int gradient_portable(const Gradient& c) { return gradient(c); }
