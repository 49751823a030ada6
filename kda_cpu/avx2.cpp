// The kernels for x86 with AVX2 and FMA. Everything after the pragma is compiled for it, and only
// called where it is there.
#if defined(__x86_64__)
#include "kernels/prelude.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define FLASHKDA_CPU_ISA avx2
#define FLASHKDA_CPU_NAME "avx2"
#define FLASHKDA_CPU_LANES 8
#define FLASHKDA_CPU_TILE_VECS 2
#include "kernels/entry.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
