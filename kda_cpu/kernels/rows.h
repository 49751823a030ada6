// Where a prefill's states lie: which row of a pool a sequence starts from and ends in, and which
// states inside it are kept.
#pragma once

#include "tokens.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

// In tokens: checkpoints lie at its multiples.
constexpr int64_t kCheckpointUnit = 16;

// Which rows of a prefill's state tensors a sequence reads and writes. Whatever the indices and
// offsets hold, no row outside of the tensors is named.
struct PrefillRows {
  const Problem& p;
  const Task& task;

  int64_t tokens() const { return task.end - task.begin; }

  // The row it starts from, kFromZero, or kFromNaN for an index outside of the pool: NaN is then
  // all that comes of the sequence.
  static constexpr int64_t kFromZero = -1, kFromNaN = -2;
  int64_t first() const {
    if (!p.initial_state.data) return kFromZero;
    if (!p.state_indices.data) return task.n;
    const int64_t row = p.state_indices.at(task.n);
    return row >= kFromZero && row < p.initial_state.rows ? row : kFromNaN;
  }

  // The row it ends in; negative: its state is not kept.
  int64_t last() const {
    if (!p.final_state.data) return -1;
    if (!p.in_place) return task.n;
    return tokens() > 0 ? first() : -1;
  }

  // The row of checkpoint c; negative: none.
  int64_t checkpoint(int64_t c) const {
    const Checkpoints& x = p.checkpoints;
    const int64_t row = x.indices.data ? x.indices.at(task.n, c) : task.n * x.C + c;
    return row < x.states.rows ? row : -1;
  }

  // Whether the sequence has such a checkpoint.
  bool has(int64_t offset) const {
    return offset >= 0 && offset <= tokens() && offset % kCheckpointUnit == 0;
  }

  // How many states at the interval the sequences before it keep.
  int64_t intervals_before() const {
    const int64_t interval = p.checkpoints.interval;
    int64_t count = 0;
    for (int64_t n = 0; n < task.n; ++n) {
      const Span span = token_span(p, n);
      count += (span.end - span.begin + interval - 1) / interval;
    }
    return count;
  }
};

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
