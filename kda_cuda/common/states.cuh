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

// Checkpoint c of the sequence: its unit, and its row of checkpoints.states, which may lie outside
// of them.
struct alignas(16) Checkpoint {
  int64_t row = -1;
  int unit = kNoCheckpoint;
};
__device__ __forceinline__ Checkpoint load_checkpoint(const Problem& p, int64_t n, int64_t tokens,
                                                      int c) {
  const Checkpoints& x = p.checkpoints;
  Checkpoint found;
  // Loaded with the offset, lest one latency follow the other.
  found.row = x.indices.ptr == nullptr ? n * x.C + c : load_index(x.indices, n, c);
  found.unit = checkpoint_unit(p, n, tokens, c);
  return found;
}

// The first unit before which sequence n keeps a state, or kNoCheckpoint; and whether any of its
// offsets is wrong.
struct FirstCheckpoint {
  int unit;
  bool wrong;
};
__device__ __forceinline__ FirstCheckpoint first_checkpoint(const Problem& p, int64_t n,
                                                            int64_t tokens, int lane) {
  const Checkpoints& x = p.checkpoints;
  if (x.states.ptr == nullptr) return {kNoCheckpoint, false};
  if (x.interval > 0) return {tokens > 0 ? 0 : kNoCheckpoint, false};
  int first = kNoCheckpoint;
  bool wrong = false;
#pragma unroll 1
  for (int begin = 0; begin < x.C; begin += 32) {
    const int c = begin + lane;
    const int unit = c < x.C ? checkpoint_unit(p, n, tokens, c) : kNoCheckpoint;
    wrong |= unit == kWrongCheckpoint;
    first = min(first, unit == kWrongCheckpoint ? kNoCheckpoint : unit);
  }
  return {__reduce_min_sync(~0u, first), __any_sync(~0u, wrong) != 0};
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

// What the search below asks for, from global memory. Tokens: as above.
template <class Tokens>
struct LoadedCheckpoints {
  const Problem& p;
  int64_t n, tokens;
  int lane;

  __device__ __forceinline__ Checkpoint operator[](int c) const {
    return load_checkpoint(p, n, tokens, c);
  }
  __device__ __forceinline__ int64_t intervals_before() const {
    return cuda::intervals_before<Tokens>(p, n, lane);
  }
};

// The rows of checkpoints.states that keep the state before unit `now`, one after another. For
// kBeforeAll there are none, for kWrongCheckpoint those that a wrong offset leaves without a state.
template <class Found>
class CheckpointRows {
 public:
  __device__ __forceinline__ CheckpointRows(const Problem& p, const Found& found, int64_t tokens,
                                            int now, int lane)
      : p_(p), found_(found), tokens_(tokens), now_(now), lane_(lane) {}

  // -1: no more.
  __device__ __forceinline__ int64_t next() {
    const Checkpoints& x = p_.checkpoints;
    if (x.states.ptr == nullptr) return -1;
    if (x.interval > 0) {
      const int step = x.interval / kCheckpointUnit;
      if (first_++ > 0) return -1;
      const int64_t next = now_ < 0 ? 0 : int64_t{now_} + step;
      if (next * kCheckpointUnit < tokens_) stop_ = static_cast<int>(next);
      if (now_ < 0) return -1;
      const int64_t row = found_.intervals_before() + now_ / step;
      return row < x.states.size ? row : -1;
    }
    while (true) {
      for (; hits_ != 0; hits_ &= hits_ - 1) {
        const int hit = __ffs(hits_) - 1;
        const int64_t row = __shfl_sync(~0u, row_, hit);
        if (row < 0 || row >= x.states.size) continue;
        hits_ &= hits_ - 1;
        return row;
      }
      if (first_ >= x.C) return -1;
      const int c = first_ + lane_;
      int unit = kNoCheckpoint;
      if (c < x.C) {
        const Checkpoint checkpoint = found_[c];
        row_ = checkpoint.row;
        unit = checkpoint.unit;
      }
      stop_ = min(stop_, __reduce_min_sync(~0u, unit > now_ ? unit : kNoCheckpoint));
      hits_ = __ballot_sync(~0u, unit == now_);
      first_ += 32;
    }
  }

  // Once there are no more: the next unit before which a state is kept, or kNoCheckpoint. After
  // kBeforeAll that may be 0: the initial state; after kWrongCheckpoint it is of no use.
  __device__ __forceinline__ int stop() const { return stop_; }

 private:
  const Problem& p_;
  const Found found_;
  int64_t tokens_;
  int now_, lane_;
  int first_ = 0;      // of the offsets that have not been looked at
  uint32_t hits_ = 0;  // of the 32 before it, those not returned yet
  int64_t row_ = -1;   // of the lane's offset of these
  int stop_ = kNoCheckpoint;
};

}  // namespace flashkda::cuda
