// Prefill: one sequence and head, chunk by chunk.
//
// With G_i = sum of g_t for t <= i within the chunk, and S the state before it (kda.md, the chunk
// form):
//
//     A_ij = beta_i sum_d k_i[d] k_j[d] exp(G_i[d] - G_j[d])    j < i
//     M_ij =        sum_d q_i[d] k_j[d] exp(G_i[d] - G_j[d])    j <= i
//     (I + A) U = beta (V - Kbar S)          Kbar_i = k_i exp(G_i)
//     O  = scale (Qbar S + M U)              Qbar_i = q_i exp(G_i)
//     S' = Diag(exp G_C) S + Ktilde^T U      Ktilde_j = k_j exp(G_C - G_j)
//
// Where the time goes, for C = 16 tokens and K = V = 128: the three products with the state
// take 1.57 MFLOP, and so many a token whatever C is; A and M grow with C and take 0.1 MFLOP. So C
// is small: the least that lets every element of S, once it is in a register, serve for many
// multiply-adds. (32 rows of Kbar and Qbar share one pass over S.)
//
// How every gate is exact: an exponential of a difference is never split into factors that could
// overflow. Each key is carried along the chunk, w_j = k_j exp(G_i - G_j), and decayed by exp(g_i)
// <= 1 when token i comes: one multiplication an element, next to the two multiply-adds that the
// element's terms of A_ij and M_ij need anyway. Every factor is a product of decays, so it
// underflows only where the true product does; no reference points, no case for steep gates. After
// the last token the w_j are Ktilde. One exponential an element is all there is, and one more a
// channel: the decay of the state is exp(G_C) rather than a product of C rounded factors, because
// it is applied anew in every chunk and a product would lose C times as much on channels that
// remember for thousands of tokens.
//
// U is found by substitution, row by row; no inverse is formed. A row of A, M, U and O depends on
// earlier tokens only.
#pragma once

#include "rows.h"
#include "state.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

constexpr int64_t kChunk = 16;
static_assert(kCheckpointUnit % kChunk == 0, "checkpoints lie between chunks");

struct ChunkScratch {
  TokenBlock x;   // the chunk's tokens; x.v becomes U
  float* e;       // [C, ld_k] decay of each token, exp(g)
  float* w;       // [C, ld_k] keys, decayed up to the current token
  float* kq_bar;  // [2 C, ld_k] rows of Kbar and Qbar in turn
  float* decay;   // [ld_k] exp(G_C)
  float* A;       // [C, C] without beta
  float* M;       // [C, C]
  float* P;       // [2 C, ld_v] Kbar S and Qbar S in turn; the latter's rows become O
  float* S;       // [K, ld_v]

  ChunkScratch(Arena& arena, int64_t K, int64_t V)
      : x(arena, kChunk, K, V),
        e(arena.take(kChunk * x.ld_k)),
        w(arena.take(kChunk * x.ld_k)),
        kq_bar(arena.take(2 * kChunk * x.ld_k)),
        decay(arena.take(x.ld_k)),
        A(arena.take(kChunk * kChunk)),
        M(arena.take(kChunk * kChunk)),
        P(arena.take(2 * kChunk * x.ld_v)),
        S(arena.take(K * x.ld_v)) {}
};

// e, Kbar, Qbar and exp(G_C).
inline void decay_factors(const ChunkScratch& s, int64_t C) {
  const int64_t ld = s.x.ld_k;
  for (int64_t d = 0; d < ld; d += kLanes) {
    Vec G = {};
    Vec exp_G = broadcast(1.f);
    for (int64_t i = 0; i < C; ++i) {
      const Vec g = load(s.x.g + i * ld + d);
      const Vec e = exp(g);
      G += g;
      exp_G *= e;
      store(s.e + i * ld + d, e);
      store(s.kq_bar + (2 * i) * ld + d, exp_G * load(s.x.k + i * ld + d));
      store(s.kq_bar + (2 * i + 1) * ld + d, exp_G * load(s.x.q + i * ld + d));
    }
    store(s.decay + d, exp(G));
  }
}

// Rows of A and M, and in w the keys decayed to the end of the chunk. Keys are taken four at a
// time; those that are not there yet (j >= i) may be anything, what they give is not used.
inline void token_pairs(const ChunkScratch& s, int64_t C) {
  const int64_t ld = s.x.ld_k;
  for (int64_t i = 0; i < C; ++i) {
    const float *e = s.e + i * ld, *k = s.x.k + i * ld, *q = s.x.q + i * ld;
    for (int64_t j = 0; j < i; j += 4) {
      float* w = s.w + j * ld;
      Vec a[4] = {}, m[4] = {};
      for (int64_t d = 0; d < ld; d += kLanes) {
        const Vec e_d = load(e + d), k_d = load(k + d), q_d = load(q + d);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const Vec w_d = load(w + r * ld + d) * e_d;
          store(w + r * ld + d, w_d);
          a[r] += w_d * k_d;
          m[r] += w_d * q_d;
        }
      }
      const Vec sum_a = sum_lanes(a[0], a[1], a[2], a[3]),
                sum_m = sum_lanes(m[0], m[1], m[2], m[3]);
      std::memcpy(s.A + i * kChunk + j, &sum_a, 4 * sizeof(float));
      std::memcpy(s.M + i * kChunk + j, &sum_m, 4 * sizeof(float));
    }
    Vec m = {};
    for (int64_t d = 0; d < ld; d += kLanes) {
      const Vec k_d = load(k + d);
      store(s.w + i * ld + d, k_d);
      m += k_d * load(q + d);
    }
    s.M[i * kChunk + i] = sum_lanes(m, Vec{}, Vec{}, Vec{})[0];
  }
}

// acc[r] += sum over j < n of a[r * stride_r + j * stride_j] * b[j * ld_b ...], for kRows rows of
// one tile of columns.
template <int kRows>
FLASHKDA_INLINE void multiply_add(const float* a, int64_t stride_r, int64_t stride_j,
                                  const float* b, int64_t ld_b, int64_t n,
                                  Vec (&acc)[kRows][kTileVecs]) {
  for (int64_t j = 0; j < n; ++j) {
    Vec b_j[kTileVecs];
#pragma GCC unroll 8
    for (int c = 0; c < kTileVecs; ++c) b_j[c] = load(b + j * ld_b + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float a_rj = a[r * stride_r + j * stride_j];
#pragma GCC unroll 8
      for (int c = 0; c < kTileVecs; ++c) acc[r][c] += a_rj * b_j[c];
    }
  }
}

// kRows rows of P = Kbar S, Qbar S in one tile of columns.
template <int kRows>
inline void read_state(const ChunkScratch& s, int64_t row, int64_t col, int64_t K) {
  Vec acc[kRows][kTileVecs] = {};
  multiply_add<kRows>(s.kq_bar + row * s.x.ld_k, s.x.ld_k, 1, s.S + col, s.x.ld_v, K, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileVecs; ++c)
      store(s.P + (row + r) * s.x.ld_v + col + c * kLanes, acc[r][c]);
  }
}

// kRows rows of S' = Diag(exp G_C) S + Ktilde^T U in one tile of columns.
template <int kRows>
inline void write_state(const ChunkScratch& s, int64_t d, int64_t col, int64_t C) {
  Vec acc[kRows][kTileVecs];
  float* S = s.S + d * s.x.ld_v + col;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileVecs; ++c)
      acc[r][c] = s.decay[d + r] * load(S + r * s.x.ld_v + c * kLanes);
  }
  multiply_add<kRows>(s.w + d, 1, s.x.ld_k, s.x.v + col, s.x.ld_v, C, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kTileVecs; ++c) store(S + r * s.x.ld_v + c * kLanes, acc[r][c]);
  }
}

// U and O in one tile of columns, from P, A and M.
inline void solve(const ChunkScratch& s, int64_t col, int64_t C, float scale) {
  const int64_t ld = s.x.ld_v;
  for (int64_t i = 0; i < C; ++i) {
    float *u = s.x.v + i * ld + col, *o = s.P + (2 * i + 1) * ld + col;
    const float* p = s.P + 2 * i * ld + col;
    Vec acc[1][kTileVecs] = {};
    multiply_add<1>(s.A + i * kChunk, 0, 1, s.x.v + col, ld, i, acc);
    for (int c = 0; c < kTileVecs; ++c) {
      const Vec v = load(u + c * kLanes) - load(p + c * kLanes);
      store(u + c * kLanes, s.x.beta[i] * (v - acc[0][c]));
      acc[0][c] = load(o + c * kLanes);
    }
    multiply_add<1>(s.M + i * kChunk, 0, 1, s.x.v + col, ld, i + 1, acc);
    for (int c = 0; c < kTileVecs; ++c) store(o + c * kLanes, scale * acc[0][c]);
  }
}

inline void chunk_step(const ChunkScratch& s, int64_t K, int64_t cols, int64_t C, float scale) {
  decay_factors(s, C);
  token_pairs(s, C);
  for (int64_t col = 0; col < cols; col += kTileCols) {
    int64_t row = 0;
    for (; row + kTileRows <= 2 * C; row += kTileRows) read_state<kTileRows>(s, row, col, K);
    for (; row < 2 * C; ++row) read_state<1>(s, row, col, K);
    solve(s, col, C, scale);
    int64_t d = 0;
    for (; d + kTileRows <= K; d += kTileRows) write_state<kTileRows>(s, d, col, C);
    for (; d < K; ++d) write_state<1>(s, d, col, C);
  }
}

// Keeps the state wherever it is wanted after `done` tokens.
inline void store_checkpoints(const PrefillRows& rows, const ChunkScratch& s, int64_t done) {
  const Problem& p = rows.p;
  const Task& task = rows.task;
  const Checkpoints& x = p.checkpoints;
  const auto store = [&](int64_t row) {
    store_state(s.S, s.x.ld_v, p.K, task.v1 - task.v0, state_block(p, x.states, row, task));
  };
  if (x.interval > 0) {
    if (done % x.interval != 0 || done >= rows.tokens()) return;
    const int64_t row = rows.intervals_before() + done / x.interval;
    if (row < x.states.rows) store(row);
    return;
  }
  for (int64_t c = 0; c < x.C; ++c) {
    if (x.offsets.at(task.n, c) != done || !rows.has(done)) continue;
    const int64_t row = rows.checkpoint(c);
    if (row >= 0) store(row);
  }
}

// NaN where an offset is wrong. S is spent.
inline void spoil_wrong_checkpoints(const PrefillRows& rows, const ChunkScratch& s) {
  const Problem& p = rows.p;
  const Task& task = rows.task;
  const Checkpoints& x = p.checkpoints;
  for (int64_t c = 0; c < x.C; ++c) {
    const int64_t offset = x.offsets.at(task.n, c), row = rows.checkpoint(c);
    if (offset == -1 || rows.has(offset) || row < 0) continue;
    std::fill(s.S, s.S + p.K * s.x.ld_v, std::numeric_limits<float>::quiet_NaN());
    store_state(s.S, s.x.ld_v, p.K, task.v1 - task.v0, state_block(p, x.states, row, task));
  }
}

inline void chunk_task(const Problem& p, const Task& task, const ChunkScratch& s) {
  const int64_t cols = task.v1 - task.v0;
  const PrefillRows rows{p, task};
  const bool checkpoints = p.checkpoints.states.data;
  std::fill(s.w, s.w + kChunk * s.x.ld_k, 0.f);
  const int64_t first = rows.first();
  if (first >= 0) {
    load_state(state_block(p, p.initial_state, first, task), p.K, cols, s.S, s.x.ld_v);
  } else {
    const float value =
        first == PrefillRows::kFromZero ? 0.f : std::numeric_limits<float>::quiet_NaN();
    std::fill(s.S, s.S + p.K * s.x.ld_v, value);
  }
  const HeadGate gate = head_gate(p, task.h);
  for (int64_t t = task.begin; t < task.end; t += kChunk) {
    if (checkpoints) store_checkpoints(rows, s, t - task.begin);
    const int64_t C = std::min(kChunk, task.end - t);
    load_tokens(p, gate, task, t, C, s.x);
    chunk_step(s, p.K, cols, C, p.scale);
    store_output(p, task, t, C, s.P + s.x.ld_v, 2 * s.x.ld_v);
  }
  if (checkpoints) store_checkpoints(rows, s, rows.tokens());
  const int64_t last = rows.last();
  if (last >= 0) store_state(s.S, s.x.ld_v, p.K, cols, state_block(p, p.final_state, last, task));
  if (checkpoints) spoil_wrong_checkpoints(rows, s);
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
