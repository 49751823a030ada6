// Loads and stores of bf16, fp16 and fp32 elements whose dtype is known at run time, the same for
// all threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "params.h"

namespace flashkda::cuda {

// kConstant: nothing writes there from the kernel's start on.
template <bool kConstant, class T>
__device__ __forceinline__ T load(const T* ptr) {
  if constexpr (kConstant) return __ldg(ptr);
  return *ptr;
}

// An element's bits, so that a load can be issued long before its value is needed.
template <bool kConstant = true>
__device__ __forceinline__ uint32_t load_bits(const void* ptr, int64_t i, DType dtype) {
  if (dtype == DType::kF32) return load<kConstant>(static_cast<const uint32_t*>(ptr) + i);
  return load<kConstant>(static_cast<const uint16_t*>(ptr) + i);
}

__device__ __forceinline__ float bits_to_float(uint32_t bits, DType dtype) {
  if (dtype == DType::kF32) return __uint_as_float(bits);
  if (dtype == DType::kBF16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

__device__ __forceinline__ void store_float(void* ptr, int64_t i, DType dtype, float x) {
  if (dtype == DType::kF32) {
    static_cast<float*>(ptr)[i] = x;
  } else if (dtype == DType::kBF16) {
    static_cast<__nv_bfloat16*>(ptr)[i] = __float2bfloat16_rn(x);
  } else {
    static_cast<__half*>(ptr)[i] = __float2half_rn(x);
  }
}

template <bool kConstant = true>
__device__ __forceinline__ int64_t load_index(const void* ptr, int64_t i, bool is_64) {
  if (is_64) return load<kConstant>(static_cast<const long long*>(ptr) + i);
  return load<kConstant>(static_cast<const int32_t*>(ptr) + i);
}

// Two floats as bf16, the first in the lower half: the order of memory.
__device__ __forceinline__ uint32_t pack_bf16(float lower, float upper) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lower, upper);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

}  // namespace flashkda::cuda
