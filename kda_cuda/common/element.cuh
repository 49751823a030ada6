// The 16-bit types of q, k, v and the tensor-core product on them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm80.hpp>

namespace flashkda::cuda {

template <class Elem>
struct ElementTraits;

template <>
struct ElementTraits<__nv_bfloat16> {
  using Mma = cute::SM80_16x8x16_F32BF16BF16F32_TN;

  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    __nv_bfloat162 x = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<uint32_t&>(x);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t x) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
  }
  static __device__ __forceinline__ uint32_t multiply(uint32_t x, uint32_t y) {
    const __nv_bfloat162 product =
        __hmul2(reinterpret_cast<__nv_bfloat162&>(x), reinterpret_cast<__nv_bfloat162&>(y));
    return reinterpret_cast<const uint32_t&>(product);
  }
  static __device__ __forceinline__ __nv_bfloat16 from_float(float x) {
    return __float2bfloat16_rn(x);
  }
};

template <>
struct ElementTraits<__half> {
  using Mma = cute::SM80_16x8x16_F32F16F16F32_TN;

  static __device__ __forceinline__ uint32_t pack(float lo, float hi) {
    __half2 x = __floats2half2_rn(lo, hi);
    return reinterpret_cast<uint32_t&>(x);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t x) {
    return __half22float2(reinterpret_cast<__half2&>(x));
  }
  static __device__ __forceinline__ __half from_float(float x) { return __float2half_rn(x); }
};

// d += a b for a 16x16 fragment a and a 16x8 fragment b.
template <class Elem>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  ElementTraits<Elem>::Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b0, b1, d[0], d[1],
                                d[2], d[3]);
}

// Two neighbouring accumulator tiles, 16 x 16, as the left operand of the next product.
template <class Elem>
__device__ __forceinline__ void to_operand(uint32_t (&a)[4], const float (&left)[4],
                                           const float (&right)[4]) {
  using Traits = ElementTraits<Elem>;
  a[0] = Traits::pack(left[0], left[1]);
  a[1] = Traits::pack(left[2], left[3]);
  a[2] = Traits::pack(right[0], right[1]);
  a[3] = Traits::pack(right[2], right[3]);
}

}  // namespace flashkda::cuda
