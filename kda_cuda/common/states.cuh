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

// Checkpoints are counted in units of 16 tokens. What follows is called by whole warps and gives
// all lanes the same; n is the sequence, tokens its length.
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

// The row that checkpoint c of the sequence names, which may be none of checkpoints.states.
__device__ __forceinline__ int64_t checkpoint_row(const Problem& p, int64_t n, int c) {
  const Checkpoints& x = p.checkpoints;
  return x.indices.ptr == nullptr ? n * x.C + c : load_index(x.indices, n, c);
}

// How many states at the interval the sequences before n keep. Tokens: what theirs are counted in,
// which are fewer than 2^31. A division of 64 bits is a call, whatever that does to code nearby.
template <class Tokens>
__device__ __forceinline__ int64_t intervals_before(const Problem& p, int64_t n, int lane) {
  const int interval = p.checkpoints.interval;
  const auto intervals_of = [&](int64_t tokens) {
    return (static_cast<Tokens>(tokens) + interval - 1) / interval;
  };
  if (p.cu_seqlens == nullptr) return n * intervals_of(p.T);
  int count = 0;  // at most T / interval + N
  for (int64_t m = lane; m < n; m += 32) {
    const auto end = [&](int64_t i) {
      return min(max(load_index(p.cu_seqlens, i, p.cu_seqlens_64), int64_t{0}), p.T);
    };
    count += static_cast<int>(intervals_of(max(end(m + 1) - end(m), int64_t{0})));
  }
  return __reduce_add_sync(~0u, count);
}

// A checkpoint of the sequence: the c-th of its offsets, or of those at the interval.
struct Checkpoint {
  int unit;
  int c;
};

// What the search below asks for, from global memory. Tokens: as above.
template <class Tokens>
struct LoadedCheckpoints {
  const Problem& p;
  int64_t n, tokens;
  int lane;

  __device__ __forceinline__ int unit(int c) const { return checkpoint_unit(p, n, tokens, c); }
  __device__ __forceinline__ int64_t row(int c) const { return checkpoint_row(p, n, c); }
  __device__ __forceinline__ int64_t intervals_before() const {
    return cuda::intervals_before<Tokens>(p, n, lane);
  }
};

// Of the offsets, the first checkpoint after another, by units and among a unit's by c.
template <class Found>
__device__ __forceinline__ Checkpoint offset_after(const Found& found, int C,
                                                   const Checkpoint& after, int lane) {
  Checkpoint best = {kNoCheckpoint, INT_MAX};
#pragma unroll 1
  for (int first = 0; first < C; first += 32) {
    const int c = first + lane;
    const int unit = c < C ? found.unit(c) : kNoCheckpoint;
    const bool later = unit > after.unit || (unit == after.unit && c > after.c);
    if (later && unit < best.unit) best = {unit, c};
  }
  const int unit = __reduce_min_sync(~0u, best.unit);
  return {unit, __reduce_min_sync(~0u, best.unit == unit ? best.c : INT_MAX)};
}

// One at the interval, or none.
__device__ __forceinline__ Checkpoint at_interval(int64_t tokens, int unit, int c) {
  return {int64_t{unit} * kCheckpointUnit < tokens ? unit : kNoCheckpoint, c};
}

// The first checkpoint from a unit on, or kNoCheckpoint; from kWrongCheckpoint on, the first wrong
// one if there is any.
template <class Found>
__device__ __forceinline__ Checkpoint first_checkpoint(const Problem& p, const Found& found,
                                                       int64_t tokens, int unit, int lane) {
  const int interval = p.checkpoints.interval / kCheckpointUnit;
  if (interval == 0) return offset_after(found, p.checkpoints.C, {unit, -1}, lane);
  return unit < 0 ? at_interval(tokens, 0, 0) : at_interval(tokens, unit, unit / interval);
}

// And the one after another.
template <class Found>
__device__ __forceinline__ Checkpoint next_checkpoint(const Problem& p, const Found& found,
                                                      int64_t tokens, const Checkpoint& after,
                                                      int lane) {
  const int interval = p.checkpoints.interval / kCheckpointUnit;
  if (interval == 0) return offset_after(found, p.checkpoints.C, after, lane);
  return at_interval(tokens, after.unit + interval, after.c + 1);
}

// The row of checkpoints.states that keeps it, or -1.
template <class Found>
__device__ __forceinline__ int64_t row_of(const Problem& p, const Found& found, int c) {
  const Checkpoints& x = p.checkpoints;
  const int64_t row = x.interval > 0 ? found.intervals_before() + c : found.row(c);
  return row >= 0 && row < x.states.size ? row : -1;
}

}  // namespace flashkda::cuda
