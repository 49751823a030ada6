// Rows of bf16, fp16 or fp32 in memory, rows of fp32 in scratch.
#pragma once

#include "simd.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

FLASHKDA_INLINE BitVec load_bits16(const void* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof(half));
  return __builtin_convertvector(half, BitVec);
}

FLASHKDA_INLINE void store_bits16(void* p, BitVec bits) {
  const HalfVec half = __builtin_convertvector(bits, HalfVec);
  std::memcpy(p, &half, sizeof(half));
}

FLASHKDA_INLINE Vec load_as_f32(const float* p) { return load(p); }

FLASHKDA_INLINE Vec load_as_f32(const BF16* p) { return bit_cast<Vec>(load_bits16(p) << 16); }

FLASHKDA_INLINE Vec load_as_f32(const F16* p) {
  constexpr uint32_t kRebias = 112u << 23;  // from fp16's exponent bias, 15, to fp32's, 127
  const BitVec bits = load_bits16(p);
  const BitVec magnitude = (bits & 0x7fffu) << 13;
  const BitVec normal = magnitude + kRebias;
  const BitVec inf_or_nan = normal + kRebias;
  // Below the smallest normal number the significand is an integer count of 2^-24.
  const BitVec subnormal =
      bit_cast<BitVec>(__builtin_convertvector(bit_cast<IntVec>(bits & 0x3ffu), Vec) * 0x1p-24f);
  BitVec x = magnitude >= (0x7c00u << 13) ? inf_or_nan : normal;
  x = magnitude < (0x0400u << 13) ? subnormal : x;
  return bit_cast<Vec>(x | (bits & 0x8000u) << 16);
}

FLASHKDA_INLINE void store_from_f32(float* p, Vec x) { store(p, x); }

FLASHKDA_INLINE void store_from_f32(BF16* p, Vec x) {
  const BitVec bits = bit_cast<BitVec>(x);
  const BitVec nan = (bits >> 16) | 0x40u;
  const BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_bits16(p, (bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

FLASHKDA_INLINE void store_from_f32(F16* p, Vec x) {
  const BitVec bits = bit_cast<BitVec>(x);
  const BitVec magnitude = bits & 0x7fffffffu;
  const BitVec sign = (bits >> 16) & 0x8000u;
  BitVec half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 1/2, whose last place is 2^-24, rounds to fp16's subnormal grid.
  const BitVec subnormal = bit_cast<BitVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  half = magnitude < (113u << 23) ? subnormal : half;
  const BitVec inf = 0x7c00u - BitVec{}, nan = 0x7e00u - BitVec{};
  half = magnitude >= 0x477ff000u ? inf : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? nan : half;
  store_bits16(p, half | sign);
}

// dst[i * ld + d] = src[i * stride_i + d * stride_d] for i < rows, d < cols; columns up to ld
// become 0. ld is a multiple of kLanes.
template <class T>
void load_rows(const T* src, int64_t stride_i, int64_t stride_d, int64_t rows, int64_t cols,
               float* dst, int64_t ld) {
  T piece[kLanes];
  if (stride_d == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = src + i * stride_i;
      float* to = dst + i * ld;
      int64_t d = 0;
      for (; d + kLanes <= cols; d += kLanes) store(to + d, load_as_f32(from + d));
      if (d < cols) {
        std::memset(piece, 0, sizeof(piece));
        std::memcpy(piece, from + d, (cols - d) * sizeof(T));
        store(to + d, load_as_f32(piece));
        d += kLanes;
      }
      for (; d < ld; d += kLanes) store(to + d, Vec{});
    }
    return;
  }
  // Down the columns first: where stride_d is large, as in the [B, C, T] activations of a
  // convolution, a cache line holds neighbouring rows.
  float column[kLanes];
  for (int64_t i0 = 0; i0 < rows; i0 += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, rows - i0);
    std::memset(piece, 0, sizeof(piece));
    for (int64_t d = 0; d < cols; ++d) {
      const T* from = src + i0 * stride_i + d * stride_d;
      for (int64_t i = 0; i < n; ++i) piece[i] = from[i * stride_i];
      store(column, load_as_f32(piece));
      for (int64_t i = 0; i < n; ++i) dst[(i0 + i) * ld + d] = column[i];
    }
    for (int64_t i = 0; i < n; ++i)
      std::fill(dst + (i0 + i) * ld + cols, dst + (i0 + i + 1) * ld, 0.f);
  }
}

// The way back; the padding is dropped.
template <class T>
void store_rows(const float* src, int64_t ld, int64_t rows, int64_t cols, T* dst, int64_t stride_i,
                int64_t stride_d) {
  T piece[kLanes];
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = src + i * ld;
    T* to = dst + i * stride_i;
    for (int64_t d = 0; d < cols; d += kLanes) {
      if (stride_d == 1 && d + kLanes <= cols) {
        store_from_f32(to + d, load(from + d));
        continue;
      }
      store_from_f32(piece, load(from + d));
      const int64_t n = std::min<int64_t>(kLanes, cols - d);
      for (int64_t l = 0; l < n; ++l) to[(d + l) * stride_d] = piece[l];
    }
  }
}

// Calls f with a pointer of the dtype's type, `offset` elements into data.
template <class F>
FLASHKDA_INLINE void with_dtype(void* data, DType dtype, int64_t offset, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(static_cast<float*>(data) + offset);
    case DType::kBF16:
      return f(static_cast<BF16*>(data) + offset);
    case DType::kF16:
      return f(static_cast<F16*>(data) + offset);
  }
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
