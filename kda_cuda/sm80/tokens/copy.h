// Tokens [B, T, heads, D] of two bytes an element that lie next to each other in memory, as a
// convolution over T leaves them, brought into the order that the other kernels can follow.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashkda::cuda::sm80::tokens {

struct Copy {
  const void* from = nullptr;
  void* to = nullptr;  // contiguous, 4-byte aligned
  int64_t B = 0, T = 0;
  int heads = 0, D = 0;                              // at most 65,535, and a multiple of 64
  int64_t stride_b = 0, stride_h = 0, stride_d = 0;  // of `from`, in elements; that of T is 1
};

cudaError_t copy(const Copy& x, cudaStream_t stream);

}  // namespace flashkda::cuda::sm80::tokens
