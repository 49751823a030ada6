// Gate and beta activations in fp32.
#pragma once

#include "params.h"

namespace flashkda::cuda {

// 1 / (1 + exp(-x)); 0 and 1 at the infinities.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + expf(-x)); }

// log(1 + exp(x)), the identity past torch's threshold.
__device__ __forceinline__ float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// What a channel's gate input x is turned into a log decay with.
struct GateParams {
  Gate gate;
  float lower_bound;
  float exp_A;  // exp(A_log) of the head, 1 where there is none
  float bias;   // dt_bias of the channel, 0 where there is none
};

__device__ __forceinline__ GateParams load_gate_params(const Problem& p, int hv, int channel) {
  GateParams params{p.gate, p.lower_bound, 1.f, 0.f};
  if (p.A_log != nullptr) params.exp_A = expf(__ldg(p.A_log + hv));
  if (p.dt_bias != nullptr) {
    params.bias = __ldg(p.dt_bias + static_cast<int64_t>(hv) * p.K + channel);
  }
  return params;
}

// The log decay g <= 0. Its caller must not apply it to rows past a sequence's end: there g is 0.
__device__ __forceinline__ float log_decay(float x, const GateParams& params) {
  switch (params.gate) {
    case Gate::kSoftplus:
      return -params.exp_A * softplus(x + params.bias);
    case Gate::kBounded:
      return params.lower_bound * sigmoid(params.exp_A * (x + params.bias));
    default:
      return x;
  }
}

__device__ __forceinline__ float beta_activation(float x, BetaMode mode) {
  switch (mode) {
    case BetaMode::kSigmoid:
      return sigmoid(x);
    case BetaMode::kTwiceSigmoid:
      return 2.f * sigmoid(x);
    default:
      return x;
  }
}

}  // namespace flashkda::cuda
