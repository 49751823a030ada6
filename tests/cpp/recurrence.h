// The operation as kda.md writes it, in double, token by token, element by element: what the
// kernels are checked against.
#pragma once

#include "tensors.h"

namespace check {

using flashkda::cpu::BetaMode;
using flashkda::cpu::Gate;
using flashkda::cpu::Problem;

struct Inputs {
  const Tokens &q, &k, &v, &g, &beta;
  const std::vector<float>&A_log, &dt_bias;  // empty: absent
};

inline double log_decay(const Problem& p, const Inputs& in, int64_t h, int64_t d, double x) {
  if (p.gate == Gate::kGiven) return x;
  const double A = in.A_log.empty() ? 1 : std::exp(static_cast<double>(in.A_log[h]));
  if (!in.dt_bias.empty()) x += in.dt_bias[h * p.K + d];
  if (p.gate == Gate::kSoftplus)
    return -A * (std::fmax(x, 0) + std::log1p(std::exp(-std::fabs(x))));
  return p.lower_bound / (1 + std::exp(-A * x));
}

// Tokens [begin, end) of batch row b, value head h. S is [K, V], in and out; o gets a row of V for
// each token, and after_token is called with S after each.
template <class AfterToken>
void recurrence(const Problem& p, const Inputs& in, int64_t b, int64_t begin, int64_t end,
                int64_t h, std::vector<double>& S, std::vector<double>& o,
                AfterToken&& after_token) {
  const int64_t K = p.K, V = p.V, h_qk = h / (p.HV / p.H);
  std::vector<double> q(K), k(K), u(V);
  for (int64_t t = begin; t < end; ++t) {
    double qq = 0, kk = 0;
    for (int64_t d = 0; d < K; ++d) {
      q[d] = in.q.memory.get(in.q.at(b, t, h_qk, d));
      k[d] = in.k.memory.get(in.k.at(b, t, h_qk, d));
      qq += q[d] * q[d];
      kk += k[d] * k[d];
    }
    for (int64_t d = 0; p.l2norm && d < K; ++d) {
      q[d] /= std::sqrt(qq + 1e-6);
      k[d] /= std::sqrt(kk + 1e-6);
    }
    double beta = in.beta.memory.get(in.beta.at(b, t, h, 0));
    if (p.beta_mode != BetaMode::kGiven) beta = 1 / (1 + std::exp(-beta));
    if (p.beta_mode == BetaMode::kTwiceSigmoid) beta *= 2;

    for (int64_t c = 0; c < V; ++c) u[c] = in.v.memory.get(in.v.at(b, t, h, c));
    for (int64_t d = 0; d < K; ++d) {
      const double decay = std::exp(log_decay(p, in, h, d, in.g.memory.get(in.g.at(b, t, h, d))));
      for (int64_t c = 0; c < V; ++c) {
        S[d * V + c] *= decay;
        u[c] -= S[d * V + c] * k[d];
      }
    }
    double* o_t = &o[(t - begin) * V];
    std::fill(o_t, o_t + V, 0.0);
    for (int64_t d = 0; d < K; ++d) {
      for (int64_t c = 0; c < V; ++c) {
        S[d * V + c] += k[d] * beta * u[c];
        o_t[c] += p.scale * S[d * V + c] * q[d];
      }
    }
    after_token(t - begin, S);
  }
}

}  // namespace check
