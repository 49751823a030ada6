// A few tokens of one head, in fp32 and activated: what both forms of the operation start from.
#pragma once

#include "convert.h"
#include "gate.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

// One sequence, one value head, columns [v0, v1) of v, o and the state. Columns are independent of
// each other.
struct Task {
  int64_t n = 0;      // sequence
  int64_t b = 0;      // batch row that holds it
  int64_t begin = 0;  // its tokens are [begin, end) of that row
  int64_t end = 0;
  int64_t h = 0;
  int64_t v0 = 0, v1 = 0;
};

// The tokens of sequence n in its batch row, whatever cu_seqlens holds.
struct Span {
  int64_t begin, end;
};

inline Span token_span(const Problem& p, int64_t n) {
  if (!p.cu_seqlens.data) return {0, p.T};
  const int64_t begin = std::clamp<int64_t>(p.cu_seqlens.at(n), 0, p.T);
  return {begin, std::clamp<int64_t>(p.cu_seqlens.at(n + 1), begin, p.T)};
}

// Hands out pieces of a thread's scratch memory; with no memory behind it, it measures.
struct Arena {
  float* base = nullptr;
  int64_t used = 0;

  float* take(int64_t n) {
    float* piece = base ? base + used : nullptr;
    used += round_up(n, 16);
    return piece;
  }
};

// Rows of padded length: ld_k for q, k, g and ld_v for v. Padding is 0.
struct TokenBlock {
  int64_t ld_k, ld_v;
  float *q, *k, *g, *v, *beta;

  TokenBlock(Arena& arena, int64_t tokens, int64_t K, int64_t V)
      : ld_k(round_up(K, kLanes)),
        ld_v(round_up(V, kTileCols)),
        q(arena.take(tokens * ld_k)),
        k(arena.take(tokens * ld_k)),
        g(arena.take(tokens * ld_k)),
        v(arena.take(tokens * ld_v)),
        beta(arena.take(round_up(tokens, kLanes))) {}
};

inline void load_tensor(const TokenTensor& x, const Task& task, int64_t t, int64_t head, int64_t d0,
                        int64_t tokens, int64_t cols, float* dst, int64_t ld) {
  const int64_t offset = task.b * x.stride_b + t * x.stride_t + head * x.stride_h + d0 * x.stride_d;
  with_dtype(x.data, x.dtype, offset, [&](const auto* src) {
    load_rows(src, x.stride_t, x.stride_d, tokens, cols, dst, ld);
  });
}

inline void normalize_rows(float* x, int64_t rows, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec squares = {};
    for (int64_t d = 0; d < ld; d += kLanes) {
      const Vec y = load(x + i * ld + d);
      squares += y * y;
    }
    const float factor = 1.f / std::sqrt(sum_lanes(squares, Vec{}, Vec{}, Vec{})[0] + 1e-6f);
    for (int64_t d = 0; d < ld; d += kLanes) store(x + i * ld + d, load(x + i * ld + d) * factor);
  }
}

// Loads `tokens` tokens from t on: q and k normalised if asked, g as log decay, beta as write
// strength.
inline void load_tokens(const Problem& p, const HeadGate& gate, const Task& task, int64_t t,
                        int64_t tokens, const TokenBlock& x) {
  const int64_t h_qk = task.h / (p.HV / p.H);
  load_tensor(p.q, task, t, h_qk, 0, tokens, p.K, x.q, x.ld_k);
  load_tensor(p.k, task, t, h_qk, 0, tokens, p.K, x.k, x.ld_k);
  load_tensor(p.g, task, t, task.h, 0, tokens, p.K, x.g, x.ld_k);
  load_tensor(p.v, task, t, task.h, task.v0, tokens, task.v1 - task.v0, x.v, x.ld_v);
  TokenTensor beta = p.beta;  // its tokens lie along a row of x.beta
  beta.stride_d = beta.stride_t;
  const int64_t ld_beta = round_up(tokens, kLanes);
  load_tensor(beta, task, t, task.h, 0, 1, tokens, x.beta, ld_beta);
  if (p.l2norm) {
    normalize_rows(x.q, tokens, x.ld_k);
    normalize_rows(x.k, tokens, x.ld_k);
  }
  activate_gate(gate, tokens, p.K, x.g, x.ld_k);
  activate_beta(p.beta_mode, x.beta, ld_beta);
}

// Stores rows of o for the tokens from t on.
inline void store_output(const Problem& p, const Task& task, int64_t t, int64_t tokens,
                         const float* o, int64_t ld) {
  const TokenTensor& x = p.o;
  const int64_t offset =
      task.b * x.stride_b + t * x.stride_t + task.h * x.stride_h + task.v0 * x.stride_d;
  with_dtype(x.data, x.dtype, offset, [&](auto* dst) {
    store_rows(o, ld, tokens, task.v1 - task.v0, dst, x.stride_t, x.stride_d);
  });
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
