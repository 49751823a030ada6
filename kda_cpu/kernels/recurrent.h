// Decode: one sequence and head, token by token, bound by reading and writing the state once a
// token.
//
// With S' = Diag(exp g) S the output needs no look at the new state:
//
//     u = beta (v - S'^T k)      o = scale S_new^T q = scale (S'^T q + (k . q) u)      S_new = S' +
//     k u^T
//
// so both products are taken in one pass over S, and a second pass, which finds S in the core's
// cache, writes S_new. The state is read from where it lies and written to where it shall lie when
// both are fp32 in whole vectors; else it goes through scratch. It is carried in fp32 from the
// first token to the last, whatever it is stored as.
#pragma once

#include "state.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

// The state as a step sees it: rows of K by the task's columns, or with state_v_first the task's
// columns by K.
struct StateRows {
  float* data;  // null: not wanted
  int64_t ld;
};

struct RecurrentScratch {
  TokenBlock x;
  float *e, *ek, *eq;  // [ld_k] exp(g), and k and q times it
  float* u;            // [ld_v]
  float* o;            // [ld_v]
  float* S;            // [K, ld_v] or [V, ld_k]

  RecurrentScratch(Arena& arena, int64_t K, int64_t V)
      : x(arena, 1, K, V),
        e(arena.take(x.ld_k)),
        ek(arena.take(x.ld_k)),
        eq(arena.take(x.ld_k)),
        u(arena.take(x.ld_v)),
        o(arena.take(x.ld_v)),
        S(arena.take(std::max(K * x.ld_v, V * x.ld_k))) {}
};

// Decay factors of the token in s.x; returns k . q.
inline float prepare_token(const RecurrentScratch& s) {
  Vec kq = {};
  for (int64_t d = 0; d < s.x.ld_k; d += kLanes) {
    const Vec e = exp(load(s.x.g + d)), k = load(s.x.k + d), q = load(s.x.q + d);
    store(s.e + d, e);
    store(s.ek + d, e * k);
    store(s.eq + d, e * q);
    kq += k * q;
  }
  return sum_lanes(kq, Vec{}, Vec{}, Vec{})[0];
}

// One token on a [K, V] state.
inline void step_k_first(const RecurrentScratch& s, int64_t K, int64_t cols, float scale,
                         StateRows from, StateRows to) {
  const float kq = prepare_token(s), beta = s.x.beta[0];
  for (int64_t col = 0; col < cols; col += kTileCols) {
    Vec Sk[kTileVecs] = {}, Sq[kTileVecs] = {};
    for (int64_t d = 0; d < K; ++d) {
      const float ek = s.ek[d], eq = s.eq[d];
#pragma GCC unroll 8
      for (int c = 0; c < kTileVecs; ++c) {
        const Vec S = load(from.data + d * from.ld + col + c * kLanes);
        Sk[c] += ek * S;
        Sq[c] += eq * S;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kTileVecs; ++c) {
      const Vec u = beta * (load(s.x.v + col + c * kLanes) - Sk[c]);
      store(s.u + col + c * kLanes, u);
      store(s.o + col + c * kLanes, scale * (Sq[c] + kq * u));
    }
  }
  if (!to.data) return;
  // Row by row, so that memory is written in the order in which it lies.
  for (int64_t d = 0; d < K; ++d) {
    const float e = s.e[d], k = s.x.k[d];
    for (int64_t c = 0; c < cols; c += kLanes) {
      const Vec decayed = e * load(from.data + d * from.ld + c);
      store(to.data + d * to.ld + c, decayed + k * load(s.u + c));
    }
  }
}

// kRows columns of V of one token on a [V, K] state.
template <int kRows>
inline void step_v_rows(const RecurrentScratch& s, int64_t v, float kq, float scale, StateRows from,
                        StateRows to) {
  const int64_t ld_k = s.x.ld_k;
  Vec Sk[4] = {}, Sq[4] = {};
  for (int64_t d = 0; d < ld_k; d += kLanes) {
    const Vec ek = load(s.ek + d), eq = load(s.eq + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec S = load(from.data + (v + r) * from.ld + d);
      Sk[r] += S * ek;
      Sq[r] += S * eq;
    }
  }
  const Vec sum_k = sum_lanes(Sk[0], Sk[1], Sk[2], Sk[3]),
            sum_q = sum_lanes(Sq[0], Sq[1], Sq[2], Sq[3]);
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const float u = s.x.beta[0] * (s.x.v[v + r] - sum_k[r]);
    s.o[v + r] = scale * (sum_q[r] + kq * u);
    if (!to.data) continue;
    for (int64_t d = 0; d < ld_k; d += kLanes) {
      const Vec decayed = load(s.e + d) * load(from.data + (v + r) * from.ld + d);
      store(to.data + (v + r) * to.ld + d, decayed + load(s.x.k + d) * u);
    }
  }
}

inline void step_v_first(const RecurrentScratch& s, int64_t cols, float scale, StateRows from,
                         StateRows to) {
  const float kq = prepare_token(s);
  int64_t v = 0;
  for (; v + 4 <= cols; v += 4) step_v_rows<4>(s, v, kq, scale, from, to);
  for (; v < cols; ++v) step_v_rows<1>(s, v, kq, scale, from, to);
}

// Which rows of the state tensors a sequence starts from and ends in; -1 is none.
struct Slots {
  const Pool& pool;
  const Problem& p;
  const Task& task;

  bool per_token() const { return pool.in_place && pool.per_token; }

  int64_t start() const {
    if (!p.initial_state.data) return -1;
    if (!pool.state_indices.data) return task.n;
    if (!pool.per_token || !pool.num_accepted_tokens.data) return pool.state_indices.at(task.n);
    return pool.state_indices.at(task.n, pool.num_accepted_tokens.at(task.n) - 1);
  }

  // Where the state after token t (counted from the sequence's first) is kept.
  int64_t after(int64_t t) const {
    if (per_token()) return pool.state_indices.at(task.n, t);
    if (!p.final_state.data || t + 1 < task.end - task.begin) return -1;
    return pool.in_place ? start() : task.n;
  }

  bool valid() const {
    if (!pool.state_indices.data || !p.initial_state.data) return true;
    const auto in_range = [&](int64_t row) { return row >= -1 && row < p.initial_state.rows; };
    if (pool.per_token && pool.num_accepted_tokens.data) {
      const int64_t accepted = pool.num_accepted_tokens.at(task.n);
      if (accepted < 1 || accepted > pool.columns) return false;
    }
    if (!in_range(start())) return false;
    for (int64_t t = 0; per_token() && t < task.end - task.begin; ++t) {
      if (t >= pool.columns || !in_range(after(t))) return false;
    }
    return true;
  }
};

// The task's part of a state tensor as rows of contiguous elements, and scratch that can stand in
// for it.
struct StateAccess {
  int64_t rows, row_len, row_stride, vector_len;
  StateRows scratch;

  StateAccess(const Problem& p, const Task& task, const RecurrentScratch& s) {
    const int64_t cols = task.v1 - task.v0;
    rows = p.state_v_first ? cols : p.K;
    row_len = p.state_v_first ? p.K : cols;
    row_stride = p.state_v_first ? p.K : p.V;
    vector_len = p.state_v_first ? kLanes : kTileCols;
    scratch = {s.S, p.state_v_first ? s.x.ld_k : s.x.ld_v};
  }

  bool direct(const StateBlock& block) const {
    return block.dtype == DType::kF32 && row_len % vector_len == 0;
  }

  StateRows in_place(const StateBlock& block) const {
    return {static_cast<float*>(block.data) + block.offset, row_stride};
  }

  StateRows read(const StateBlock& block) const {
    if (direct(block)) return in_place(block);
    with_dtype(block.data, block.dtype, block.offset, [&](const auto* src) {
      load_rows(src, row_stride, 1, rows, row_len, scratch.data, scratch.ld);
    });
    return scratch;
  }

  void write(StateRows from, const StateBlock& block) const {
    with_dtype(block.data, block.dtype, block.offset, [&](auto* dst) {
      store_rows(from.data, from.ld, rows, row_len, dst, row_stride, 1);
    });
  }
};

inline void fill_with_nan(const Problem& p, const Pool& pool, const Task& task,
                          const RecurrentScratch& s) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::fill(s.o, s.o + s.x.ld_v, nan);
  for (int64_t t = task.begin; t < task.end; ++t) store_output(p, task, t, 1, s.o, s.x.ld_v);
  if (!pool.in_place && p.final_state.data) {
    const StateAccess access(p, task, s);
    std::fill(s.S, s.S + access.rows * access.scratch.ld, nan);
    access.write(access.scratch, state_block(p, p.final_state, task.n, task));
  }
}

inline void recurrent_task(const Problem& p, const Pool& pool, const Task& task,
                           const RecurrentScratch& s) {
  const Slots slots{pool, p, task};
  if (!slots.valid()) return fill_with_nan(p, pool, task, s);

  const StateAccess access(p, task, s);
  const int64_t tokens = task.end - task.begin, cols = task.v1 - task.v0;
  const int64_t start = slots.start();
  StateRows state = access.scratch;
  if (start >= 0) {
    state = access.read(state_block(p, p.initial_state, start, task));
  } else {
    std::fill(s.S, s.S + access.rows * access.scratch.ld, 0.f);
  }
  if (tokens == 0 && !pool.in_place && p.final_state.data) {
    access.write(state, state_block(p, p.final_state, task.n, task));
  }

  const HeadGate gate = head_gate(p, task.h);
  for (int64_t t = 0; t < tokens; ++t) {
    load_tokens(p, gate, task, task.begin + t, 1, s.x);
    const int64_t row = slots.after(t);
    const bool kept = row >= 0;
    const StateBlock block = state_block(p, p.final_state, std::max<int64_t>(row, 0), task);
    StateRows next = access.scratch;
    if (kept && access.direct(block)) next = access.in_place(block);
    if (!kept && t + 1 == tokens) next.data = nullptr;
    if (p.state_v_first) {
      step_v_first(s, cols, p.scale, state, next);
    } else {
      step_k_first(s, p.K, cols, p.scale, state, next);
    }
    store_output(p, task, task.begin + t, 1, s.o, s.x.ld_v);
    if (kept && !access.direct(block)) access.write(next, block);
    state = next;
  }
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
