#include "kda_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace flashkda::cpu {
namespace {

float load(const void* p, DType t, int64_t i) {
  if (t == DType::kF32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  uint32_t bits;
  float f;
  if (t == DType::kBF16) {
    bits = uint32_t(h) << 16;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  const uint32_t e = (h >> 10) & 31, m = h & 1023;
  if (e == 0) f = std::ldexp(float(m), -24);
  else if (e == 31) f = m ? NAN : INFINITY;
  else f = std::ldexp(float(m + 1024), int(e) - 25);
  return h >> 15 ? -f : f;
}

void store(void* p, DType t, int64_t i, float f) {
  if (t == DType::kF32) { static_cast<float*>(p)[i] = f; return; }
  uint32_t x;
  std::memcpy(&x, &f, 4);
  uint16_t h;
  if (t == DType::kBF16) {
    h = std::isnan(f) ? 0x7fc0 : uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
  } else {
    const uint16_t sign = (x >> 16) & 0x8000;
    const float a = std::fabs(f);
    if (std::isnan(f)) h = 0x7e00;
    else if (a >= 65520.f) h = sign | 0x7c00;
    else if (a < 6.103515625e-05f) h = sign | uint16_t(std::nearbyint(std::ldexp(a, 24)));
    else {
      uint32_t y;
      std::memcpy(&y, &a, 4);
      y += 0xfff + ((y >> 13) & 1);
      h = sign | uint16_t((y - (112u << 23)) >> 13);
    }
  }
  static_cast<uint16_t*>(p)[i] = h;
}

void recurrent(const Problem& p, const Pool& pool, const Threads&) {
  const int64_t K = p.K, V = p.V;
  std::vector<float> S(K * V), k(K), q(K), u(V), o(V);
  auto sidx = [&](int64_t a, int64_t b) { return p.state_v_first ? b * K + a : a * V + b; };
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t h = 0; h < p.HV; ++h) {
      const int64_t hq = h / (p.HV / p.H);
      int64_t b = n, t0 = 0, t1 = p.T;
      if (p.cu_seqlens.data) { b = 0; t0 = p.cu_seqlens.at(n); t1 = p.cu_seqlens.at(n + 1); }
      const bool has_idx = pool.state_indices.data;
      int64_t start = n;
      bool bad = false;
      const int64_t rows = p.initial_state.rows;
      if (has_idx) {
        int64_t c = 0;
        if (pool.per_token && pool.num_accepted_tokens.data) c = pool.num_accepted_tokens.at(n) - 1;
        if (c < 0) bad = true; else start = pool.state_indices.at(n, c);
        if (start < -1 || start >= rows) bad = true;
        if (pool.in_place && pool.per_token)
          for (int64_t t = 0; t < t1 - t0; ++t) { auto x = pool.state_indices.at(n, t); if (x < -1 || x >= rows) bad = true; }
      }
      auto dump = [&](const StateTensor& st, int64_t row, bool nan) {
        if (!st.data || row < 0) return;
        for (int64_t a = 0; a < K; ++a) for (int64_t c = 0; c < V; ++c)
          store(st.data, st.dtype, row * st.stride_n + h * K * V + sidx(a, c), nan ? NAN : S[a * V + c]);
      };
      if (bad) {
        for (int64_t t = t0; t < t1; ++t) for (int64_t c = 0; c < V; ++c)
          store(p.o.data, p.o.dtype, b * p.o.stride_b + t * p.o.stride_t + h * p.o.stride_h + c * p.o.stride_d, NAN);
        if (!pool.in_place) dump(p.final_state, n, true);
        continue;
      }
      for (int64_t a = 0; a < K; ++a) for (int64_t c = 0; c < V; ++c)
        S[a * V + c] = p.initial_state.data && start >= 0 ? load(p.initial_state.data, p.initial_state.dtype, start * p.initial_state.stride_n + h * K * V + sidx(a, c)) : 0.f;
      const float A = p.A_log ? std::exp(p.A_log[h]) : 1.f;
      for (int64_t t = t0; t < t1; ++t) {
        auto at = [&](const TokenTensor& x, int64_t hh, int64_t d) { return load(x.data, x.dtype, b * x.stride_b + t * x.stride_t + hh * x.stride_h + d * x.stride_d); };
        float sk = 0, sq = 0;
        for (int64_t d = 0; d < K; ++d) { k[d] = at(p.k, hq, d); q[d] = at(p.q, hq, d); sk += k[d] * k[d]; sq += q[d] * q[d]; }
        const float rk = p.l2norm ? 1.f / std::sqrt(sk + 1e-6f) : 1.f, rq = p.l2norm ? 1.f / std::sqrt(sq + 1e-6f) : 1.f;
        float beta = at(p.beta, h, 0);
        if (p.beta_mode != BetaMode::kGiven) beta = 1.f / (1.f + std::exp(-beta));
        if (p.beta_mode == BetaMode::kTwiceSigmoid) beta *= 2;
        for (int64_t c = 0; c < V; ++c) u[c] = 0, o[c] = 0;
        for (int64_t d = 0; d < K; ++d) {
          k[d] *= rk; q[d] *= rq;
          float x = at(p.g, h, d);
          if (p.gate != Gate::kGiven && p.dt_bias) x += p.dt_bias[h * K + d];
          if (p.gate == Gate::kSoftplus) x = -A * (std::fmax(x, 0.f) + std::log1p(std::exp(-std::fabs(x))));
          if (p.gate == Gate::kBounded) x = p.lower_bound / (1.f + std::exp(-A * x));
          const float e = std::exp(x);
          for (int64_t c = 0; c < V; ++c) { S[d * V + c] *= e; u[c] += S[d * V + c] * k[d]; }
        }
        for (int64_t c = 0; c < V; ++c) u[c] = beta * (at(p.v, h, c) - u[c]);
        for (int64_t d = 0; d < K; ++d)
          for (int64_t c = 0; c < V; ++c) { S[d * V + c] += k[d] * u[c]; o[c] += S[d * V + c] * q[d]; }
        for (int64_t c = 0; c < V; ++c)
          store(p.o.data, p.o.dtype, b * p.o.stride_b + t * p.o.stride_t + h * p.o.stride_h + c * p.o.stride_d, o[c] * p.scale);
        if (pool.in_place && pool.per_token && has_idx) dump(p.final_state, pool.state_indices.at(n, t - t0), false);
      }
      if (!pool.in_place) dump(p.final_state, n, false);
      else if (!pool.per_token) dump(p.final_state, has_idx ? start : n, false);
    }
}

void chunk(const Problem& p, const Threads& threads) { recurrent(p, Pool{}, threads); }

}  // namespace

const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> all = {{"plain", chunk, recurrent}};
  return all;
}

}  // namespace flashkda::cpu
