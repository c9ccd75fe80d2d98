// Kronecker-sparse products in plain C++; cpu.cpp calls them on every other machine.
#include "common.h"
#define INSTRUCTIONS portable
#include "vector_portable.h"
#include "body.h"
