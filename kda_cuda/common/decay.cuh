// exp(g) of a gate's input, as prefill needs it: the decay itself and never its logarithm, so that
// running products of decays replace exponentials of sums. The approximate instructions keep fp32's
// relative accuracy where the result is not nothing.
#pragma once

#include "params.h"
#include "ptx.cuh"

namespace flashkda::cuda {

// A head's constants; log2 e is folded in.
struct DecayParams {
  float slope;   // of the gate's input, inside the activation
  float factor;  // of the activation
};

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
// log2(log2 e): with it inside the exponent of softplus, 2^y is log2 e exp(x).
inline constexpr float kLog2Log2E = 0.5287663729448977f;

// k exp(-G) stays in bf16's range while a chunk's decay does not fall below this: just under
// exp(-80), which gates with a lower bound of -5 never pass.
inline constexpr float kSmallestBf16Decay = 1.7e-35f;

__device__ __forceinline__ DecayParams load_decay_params(const Problem& p, int hv) {
  const float exp_A = p.A_log == nullptr ? 1.f : ptx::ex2(kLog2E * __ldg(p.A_log + hv));
  switch (p.gate) {
    case Gate::kBounded:
      return {-kLog2E * exp_A, 1.f / (kLog2E * p.lower_bound)};
    case Gate::kSoftplus:
      return {kLog2E, -fmaxf(exp_A, 1e-37f)};  // times infinity, not NaN
    default:
      return {kLog2E, 1.f};
  }
}

// What is added to the slope times the gate's input.
__device__ __forceinline__ float load_shift(const Problem& p, const DecayParams& params, int hv,
                                            int channel) {
  const float constant = p.gate == Gate::kSoftplus ? kLog2Log2E : 0.f;
  if (p.dt_bias == nullptr) return constant;
  return params.slope * __ldg(p.dt_bias + static_cast<int64_t>(hv) * p.K + channel) + constant;
}

// softplus(x) / ln 2, where y = log2(log2 e exp(x)), within 4e-4 of itself, also where it is small.
// Both log2 e exp(x) and a logarithm that is too large by 2^-22, more than lg2 and its argument err
// by, lie above it; the smaller one is next to it. Infinite from y = 128 on.
__device__ __forceinline__ float softplus_over_ln2(float y) {
  const float u = ptx::ex2(y);
  return fminf(u, ptx::lg2(kLn2 * u + (1.f + 0x1p-22f)));
}

// The same for every y, where `softplus` is that.
__device__ __forceinline__ float correct_large(float softplus, float y) {
  return y > 29.f ? y - kLog2Log2E : softplus;
}

// Whether it matters: beyond this slope, softplus of 128 / log2 e and more decays to nothing.
__device__ __forceinline__ bool has_large(const DecayParams& params) {
  return params.factor > -1.2f;
}

template <Gate kGate>
__device__ __forceinline__ float decay_of(float x, const DecayParams& params, float shift) {
  if constexpr (kGate == Gate::kGiven) return ptx::ex2(kLog2E * x);
  const float y = params.slope * x + shift;
  if constexpr (kGate == Gate::kBounded) {
    // 2^(1 / (factor (1 + 2^y)))
    return ptx::ex2(ptx::rcp(ptx::ex2(y) * params.factor + params.factor));
  } else {
    return ptx::ex2(params.factor * correct_large(softplus_over_ln2(y), y));
  }
}

// beta_activation of gate.cuh with the approximate instructions.
__device__ __forceinline__ float fast_beta_activation(float x, BetaMode mode) {
  if (mode == BetaMode::kGiven) return x;
  const float y = ptx::rcp(1.f + ptx::ex2(-kLog2E * x));
  return mode == BetaMode::kTwiceSigmoid ? 2.f * y : y;
}

}  // namespace flashkda::cuda
