// The gates and beta's activations: from what the caller passes to log decays and write strengths.
#pragma once

#include "exp.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

FLASHKDA_INLINE Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

FLASHKDA_INLINE Vec softplus(Vec x) {
  const Vec zero = {};
  const Vec magnitude = x < 0.f ? -x : x;
  return (x < 0.f ? zero : x) + log1p(exp(-magnitude));
}

// The log decay of one head: g = -exp(A_log) softplus(x + dt_bias), or lower_bound
// sigmoid(exp(A_log) (x + dt_bias)).
struct HeadGate {
  Gate gate;
  float exp_A;
  float lower_bound;
  const float* dt_bias;  // [K], null: 0
};

inline HeadGate head_gate(const Problem& p, int64_t h) {
  return {p.gate, p.A_log ? std::exp(p.A_log[h]) : 1.f, p.lower_bound,
          p.dt_bias ? p.dt_bias + h * p.K : nullptr};
}

// Replaces n rows of raw gates, K long and padded to ld, by log decays. Padded lanes become
// something finite.
inline void activate_gate(const HeadGate& gate, int64_t n, int64_t K, float* g, int64_t ld) {
  if (gate.gate == Gate::kGiven) return;
  for (int64_t i = 0; i < n; ++i) {
    float* row = g + i * ld;
    if (gate.dt_bias) {
      for (int64_t d = 0; d < K; ++d) row[d] += gate.dt_bias[d];
    }
    for (int64_t d = 0; d < ld; d += kLanes) {
      const Vec x = load(row + d);
      store(row + d, gate.gate == Gate::kSoftplus ? -gate.exp_A * softplus(x)
                                                  : gate.lower_bound * sigmoid(gate.exp_A * x));
    }
  }
}

inline void activate_beta(BetaMode mode, float* beta, int64_t ld) {
  if (mode == BetaMode::kGiven) return;
  const float factor = mode == BetaMode::kTwiceSigmoid ? 2.f : 1.f;
  for (int64_t i = 0; i < ld; i += kLanes) store(beta + i, factor * sigmoid(load(beta + i)));
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
