// Small tensors for the check: any dtype, any strides, guarded against writes outside, converted
// one element at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../kda_cpu/kda_cpu.h"

namespace check {

using flashkda::cpu::DType;
using flashkda::cpu::IndexTensor;
using flashkda::cpu::StateTensor;
using flashkda::cpu::TokenTensor;

inline double decode(DType dtype, uint32_t bits) {
  if (dtype == DType::kF32) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  const int mantissa_bits = dtype == DType::kBF16 ? 7 : 10, bias = dtype == DType::kBF16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> mantissa_bits,
            mantissa = bits & ((1 << mantissa_bits) - 1);
  double x;
  if (exponent == 2 * bias + 1) {
    x = mantissa ? std::nan("") : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    x = std::ldexp(mantissa, 1 - bias - mantissa_bits);
  } else {
    x = std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  return bits & 0x8000 ? -x : x;
}

// Rounds to nearest, ties to even.
inline uint32_t encode(DType dtype, double x) {
  if (dtype == DType::kF32) {
    const float y = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &y, sizeof(bits));
    return bits;
  }
  const int mantissa_bits = dtype == DType::kBF16 ? 7 : 10, bias = dtype == DType::kBF16 ? 127 : 15;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0, infinity = (2u * bias + 1) << mantissa_bits;
  if (std::isnan(x)) return infinity | (1u << (mantissa_bits - 1));
  const double magnitude = std::fabs(x);
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int step =
      std::max(exponent - 1, 1 - bias) - mantissa_bits;  // log2 of a unit in the last place
  const double units = std::nearbyint(std::ldexp(magnitude, -step));
  // A carry out of the mantissa goes into the exponent by itself, up to infinity.
  const double bits =
      magnitude == 0 ? 0 : units + std::ldexp(step + bias + mantissa_bits - 1, mantissa_bits);
  return sign | (bits >= infinity ? infinity : static_cast<uint32_t>(bits));
}

// Memory of one dtype, every element of it a guard until it is set.
class Memory {
 public:
  Memory(DType dtype, int64_t size) : dtype_(dtype), bits_(size, guard()) {}

  void* data() {
    packed_.resize(bits_.size() * width());
    for (size_t i = 0; i < bits_.size(); ++i)
      std::memcpy(&packed_[i * width()], &bits_[i], width());
    return packed_.data();
  }
  // What the memory given out by data() holds now.
  uint32_t bits(int64_t i) const {
    uint32_t x = 0;
    std::memcpy(&x, &packed_[i * width()], width());
    return x;
  }
  double value(int64_t i) const { return decode(dtype_, bits(i)); }
  void set(int64_t i, double x) { bits_[i] = encode(dtype_, x); }
  double get(int64_t i) const { return decode(dtype_, bits_[i]); }
  int64_t size() const { return static_cast<int64_t>(bits_.size()); }
  DType dtype() const { return dtype_; }
  // A NaN, so that what is read and should not be is seen, with a pattern that no computation
  // gives.
  uint32_t guard() const {
    return dtype_ == DType::kF32 ? 0x7fc5a5a5 : dtype_ == DType::kBF16 ? 0x7fd5 : 0x7ed5;
  }

 private:
  size_t width() const { return dtype_ == DType::kF32 ? 4 : 2; }

  DType dtype_;
  std::vector<uint32_t> bits_;
  std::vector<uint8_t> packed_;
};

enum class Layout { kContiguous, kPadded, kTokensInnermost };

// [B, T, heads, D]
class Tokens {
 public:
  Tokens(DType dtype, int64_t B, int64_t T, int64_t heads, int64_t D, Layout layout)
      : B(B), T(T), heads(heads), D(D), memory(dtype, 0) {
    int64_t size = 0;
    if (layout == Layout::kTokensInnermost) {
      view = {nullptr, dtype, heads * D * T, 1, D * T, T};
      size = B * heads * D * T;
    } else {
      const int64_t pad = layout == Layout::kPadded ? 3 : 0;
      view = {nullptr, dtype, 0, 0, D + pad, 1};
      view.stride_t = heads * view.stride_h + pad;
      view.stride_b = T * view.stride_t + pad;
      size = B * view.stride_b;
    }
    memory = Memory(dtype, size);
  }

  int64_t at(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return b * view.stride_b + t * view.stride_t + h * view.stride_h + d * view.stride_d;
  }

  template <class F>
  void fill(F&& f) {
    for (int64_t b = 0; b < B; ++b)
      for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < heads; ++h)
          for (int64_t d = 0; d < D; ++d) memory.set(at(b, t, h, d), f());
  }

  TokenTensor tensor() {
    view.data = memory.data();
    return view;
  }

  int64_t B, T, heads, D;
  TokenTensor view;
  Memory memory;
};

// [rows, HV, K, V] or [rows, HV, V, K], with some elements between rows.
class States {
 public:
  States(DType dtype, int64_t rows, int64_t HV, int64_t K, int64_t V, bool v_first, int64_t pad)
      : rows(rows),
        HV(HV),
        K(K),
        V(V),
        v_first(v_first),
        stride(HV * K * V + pad),
        memory(dtype, rows * stride) {}

  int64_t at(int64_t row, int64_t h, int64_t d, int64_t c) const {
    return row * stride + h * K * V + (v_first ? c * K + d : d * V + c);
  }

  template <class F>
  void fill(F&& f) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < HV * K * V; ++i) memory.set(row * stride + i, f());
  }

  StateTensor tensor() { return {memory.data(), memory.dtype(), stride, rows}; }

  int64_t rows, HV, K, V;
  bool v_first;
  int64_t stride;
  Memory memory;
};

// [n] or [n, m] of int32 or int64.
class Indices {
 public:
  Indices(bool is_64, int64_t columns, std::vector<int64_t> values)
      : is_64_(is_64),
        columns_(columns),
        wide_(std::move(values)),
        narrow_(wide_.begin(), wide_.end()) {}

  IndexTensor tensor() const {
    return {is_64_ ? static_cast<const void*>(wide_.data()) : narrow_.data(), is_64_, columns_,
            columns_ > 1 ? 1 : 0};
  }
  int64_t at(int64_t n, int64_t t = 0) const { return wide_[n * columns_ + t]; }

 private:
  bool is_64_;
  int64_t columns_;
  std::vector<int64_t> wide_;
  std::vector<int32_t> narrow_;
};

}  // namespace check
