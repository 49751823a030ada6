// What the kernels use of the standard library. Included before a source file raises its
// instruction set, so that nothing of the library is compiled for instructions that the machine may
// lack.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "../kda_cpu.h"
