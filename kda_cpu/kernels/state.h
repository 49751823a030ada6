// A head's state in memory, [K, V] or [V, K], and the part of it that a task owns.
#pragma once

#include "tokens.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

// Element (d, c) of the task's columns lies at data[offset + d * stride_k + c * stride_v].
struct StateBlock {
  void* data;
  DType dtype;
  int64_t offset, stride_k, stride_v;
};

inline StateBlock state_block(const Problem& p, const StateTensor& s, int64_t row,
                              const Task& task) {
  const int64_t stride_k = p.state_v_first ? 1 : p.V;
  const int64_t stride_v = p.state_v_first ? p.K : 1;
  return {s.data, s.dtype, row * s.stride_n + task.h * p.K * p.V + task.v0 * stride_v, stride_k,
          stride_v};
}

// S is [K, ld] with the task's columns first.
inline void load_state(const StateBlock& from, int64_t K, int64_t cols, float* S, int64_t ld) {
  with_dtype(from.data, from.dtype, from.offset, [&](const auto* src) {
    load_rows(src, from.stride_k, from.stride_v, K, cols, S, ld);
  });
}

inline void store_state(const float* S, int64_t ld, int64_t K, int64_t cols, const StateBlock& to) {
  with_dtype(to.data, to.dtype, to.offset,
             [&](auto* dst) { store_rows(S, ld, K, cols, dst, to.stride_k, to.stride_v); });
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
