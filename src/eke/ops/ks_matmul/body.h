// What every instruction set compiles: its vectors are included before this.
#include "tiles.h"
#include "factors.h"
#include "butterfly.h"
#include "drivers.h"
#include "gradient.h"

#define NAMED_(PART, NAME) PART##_##NAME
#define NAMED(PART, NAME) NAMED_(PART, NAME)
i64 NAMED(room, INSTRUCTIONS)(const Call& c) { return room(c); }
i64 NAMED(pack, INSTRUCTIONS)(const Call& c, Ready* ready, float* memory) { return pack(c, ready, memory); }
int NAMED(forward, INSTRUCTIONS)(const Call& c) { return forward(c); }
int NAMED(gradient, INSTRUCTIONS)(const Gradient& c) { return gradient(c); }
