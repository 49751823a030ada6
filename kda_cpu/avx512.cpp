// The kernels for x86 with AVX-512. Everything after the pragma is compiled for it, and only called
// where it is there.
#if defined(__x86_64__)
#include "kernels/prelude.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FLASHKDA_CPU_ISA avx512
#define FLASHKDA_CPU_NAME "avx512"
#define FLASHKDA_CPU_LANES 16
#define FLASHKDA_CPU_TILE_VECS 4
#include "kernels/entry.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
