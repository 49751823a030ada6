// Where a prefill's states lie: which row of a pool a sequence starts from and ends in, and which
// states inside it are kept. Whatever an index or an offset on the device holds, no row outside of
// the tensors is named.
#pragma once

#include <climits>

#include "convert.cuh"
#include "params.h"

namespace flashkda::cuda {

__device__ __forceinline__ int64_t load_index(const IndexTensor& x, int64_t n, int64_t c = 0) {
  return load_index(x.ptr, n * x.stride_n + c * x.stride_c, x.is_64);
}

// Rows that are none. A sequence whose index lies outside of the pool starts from NaN: so does all
// that comes of it, and nothing else needs to know.
inline constexpr int64_t kFromZero = -1;
inline constexpr int64_t kFromNaN = -2;

// The row of initial_state that sequence n starts from, or one of the above.
__device__ __forceinline__ int64_t first_row(const Problem& p, int64_t n) {
  if (p.initial_state.ptr == nullptr) return kFromZero;
  if (p.state_indices.ptr == nullptr) return n;
  const int64_t row = load_index(p.state_indices, n);
  return row >= kFromZero && row < p.initial_state.size ? row : kFromNaN;
}

// What the state is full of where first_row is none.
__device__ __forceinline__ float first_value(int64_t row) {
  return row == kFromZero ? 0.f : __int_as_float(0x7fffffff);
}

// The row of final_state that sequence n ends in; negative: its state is not kept.
__device__ __forceinline__ int64_t last_row(const Problem& p, int64_t n, int64_t tokens) {
  if (p.final_state.ptr == nullptr) return -1;
  if (!p.in_place) return n;
  return tokens > 0 ? first_row(p, n) : -1;
}

// Checkpoints are counted in units of 16 tokens. The functions below are called by whole warps and
// give all lanes the same; n is the sequence, tokens its length.
inline constexpr int kCheckpointUnit = 16;
inline constexpr int kNoCheckpoint = INT_MAX;
inline constexpr int kBeforeAll = -1;
inline constexpr int kWrongCheckpoint = -2;  // an offset that the sequence does not have

// How many units of the sequence come before its checkpoint c.
__device__ __forceinline__ int checkpoint_unit(const Problem& p, int64_t n, int64_t tokens, int c) {
  const int64_t offset = load_index(p.checkpoints.offsets, n, c);
  if (offset == -1) return kNoCheckpoint;
  if (offset < 0 || offset > tokens || offset % kCheckpointUnit != 0) return kWrongCheckpoint;
  return static_cast<int>(offset / kCheckpointUnit);
}

// How many states at the interval the sequences before n keep.
__device__ __forceinline__ int64_t intervals_before(const Problem& p, int64_t n, int lane) {
  const int interval = p.checkpoints.interval;
  if (p.cu_seqlens == nullptr) return n * ((p.T + interval - 1) / interval);
  int count = 0;  // at most T / interval + N
  for (int64_t m = lane; m < n; m += 32) {
    const auto end = [&](int64_t i) {
      return min(max(load_index(p.cu_seqlens, i, p.cu_seqlens_64), int64_t{0}), p.T);
    };
    count += static_cast<int>((max(end(m + 1) - end(m), int64_t{0}) + interval - 1) / interval);
  }
  return __reduce_add_sync(~0u, count);
}

// Calls store(row) for every row of checkpoints.states that keeps the state before unit `now`, and
// returns the next unit before which a state is kept, or kNoCheckpoint. kBeforeAll stores nothing
// and finds the first, which may be 0: the initial state. kWrongCheckpoint goes through the rows
// that a wrong offset leaves without a state, and returns nothing of use.
template <class Store>
__device__ __forceinline__ int visit_checkpoints(const Problem& p, int64_t n, int64_t tokens,
                                                 int now, int lane, const Store& store) {
  const Checkpoints& x = p.checkpoints;
  if (x.states.ptr == nullptr) return kNoCheckpoint;
  if (x.interval > 0) {
    const int step = x.interval / kCheckpointUnit;
    if (now >= 0) {
      const int64_t row = intervals_before(p, n, lane) + now / step;
      if (row < x.states.size) store(row);
    }
    const int64_t next = now < 0 ? 0 : int64_t{now} + step;
    return next * kCheckpointUnit < tokens ? static_cast<int>(next) : kNoCheckpoint;
  }
  int next = kNoCheckpoint;
  for (int first = 0; first < x.C; first += 32) {
    const int c = first + lane;
    const int unit = c < x.C ? checkpoint_unit(p, n, tokens, c) : kNoCheckpoint;
    if (unit > now) next = min(next, unit);
    for (uint32_t found = __ballot_sync(~0u, unit == now); found != 0; found &= found - 1) {
      const int hit = first + __ffs(found) - 1;
      const int64_t row = x.indices.ptr == nullptr ? n * x.C + hit : load_index(x.indices, n, hit);
      if (row >= 0 && row < x.states.size) store(row);
    }
  }
  return __reduce_min_sync(~0u, next);
}

}  // namespace flashkda::cuda
