// The kernels for what every machine of the architecture has: SSE2, NEON.
#define FLASHKDA_CPU_ISA portable
#define FLASHKDA_CPU_NAME "portable"
#define FLASHKDA_CPU_LANES 4
#define FLASHKDA_CPU_TILE_VECS 2
#include "kernels/entry.h"
