// What a chain's warp holds of a state: 16 value columns of one sequence and head, S^T in the
// accumulators of m16n8 products (and of wgmma's, warp by warp). Loads it, stores it, and keeps the
// states inside the sequence that are asked for.
#pragma once

#include "convert.cuh"
#include "states.cuh"

namespace flashkda::cuda {

template <int K>
struct StateColumns {
  static constexpr int kTiles = K / 8;  // of the accumulators: eight channels each

  int64_t n, tokens;  // the sequence and its length
  int hv;
  int v;  // the first column
  int lane;

  // Where element i of tile t lies in a row of a state tensor.
  __device__ __forceinline__ int64_t offset(const Problem& p, const StateTensor& x, int64_t row,
                                            int t, int i) const {
    const int c = v + lane / 4 + (i / 2) * 8;
    const int d = t * 8 + (lane % 4) * 2 + (i & 1);
    return row * x.stride_n + int64_t{hv} * K * p.V + (p.state_v_first ? c * K + d : d * p.V + c);
  }

  __device__ __forceinline__ void load(const Problem& p, float (&S)[kTiles][4]) const {
    const StateTensor& x = p.initial_state;
    const int64_t row = first_row(p, n);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = offset(p, x, row, t, i);
        if (row < 0) {
          S[t][i] = first_value(row);
        } else if (x.dtype == DType::kF32) {
          S[t][i] = static_cast<const float*>(x.ptr)[at];
        } else {
          S[t][i] = __bfloat162float(static_cast<const __nv_bfloat16*>(x.ptr)[at]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_final(const Problem& p, const float (&S)[kTiles][4]) const {
    const StateTensor& x = p.final_state;
    const int64_t row = last_row(p, n, tokens);
    if (row < 0) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store_float(x.ptr, offset(p, x, row, t, i), x.dtype, S[t][i]);
    }
  }

  // What is left of the sequence before a unit of it; kNoCheckpoint is before none. A chain that
  // counts what is left knows by one comparison whether a checkpoint lies here. Fewer than 2^31
  // tokens of a sequence fit a GPU's memory.
  __device__ __forceinline__ int left_before(int unit) const {
    return unit == kNoCheckpoint ? INT_MIN : static_cast<int>(tokens) - unit * kCheckpointUnit;
  }

  // The first of these.
  __device__ __forceinline__ int first_stop(const Problem& p) const {
    return left_before(next_checkpoint(p, n, tokens, -1, lane));
  }

  // Stores the state wherever it is wanted with so much left, and returns with how much left it is
  // wanted next.
  __device__ __forceinline__ int keep(const Problem& p, const float (&S)[kTiles][4],
                                      int left) const;

  // Once at the end: NaN where an offset is wrong.
  __device__ __forceinline__ void spoil_wrong_checkpoints(const Problem& p) const;
};

// Stores the state wherever it is wanted before a unit, or NaN with kWrongCheckpoint, and returns
// before which unit it is wanted next. S is a copy in local memory. Not inlined: the addresses of
// 64 elements would be found beforehand and spilled around every step.
template <int K>
__device__ __noinline__ int store_checkpoints(const Problem& p, const float (*S)[4],
                                              StateColumns<K> columns, int unit) {
  const StateTensor& x = p.checkpoints.states;
  const auto store = [&](int64_t row) {
#pragma unroll 2
    for (int t = 0; t < columns.kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float y = unit == kWrongCheckpoint ? first_value(kFromNaN) : S[t][i];
        store_float(x.ptr, columns.offset(p, x, row, t, i), x.dtype, y);
      }
    }
  };
  for_each_checkpoint(p, columns.n, columns.tokens, unit, columns.lane, store);
  return next_checkpoint(p, columns.n, columns.tokens, unit, columns.lane);
}

template <int K>
__device__ __forceinline__ int StateColumns<K>::keep(const Problem& p, const float (&S)[kTiles][4],
                                                     int left) const {
  float copy[kTiles][4];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) copy[t][i] = S[t][i];
  }
  const int unit = (static_cast<int>(tokens) - left) / kCheckpointUnit;
  return left_before(store_checkpoints<K>(p, copy, *this, unit));
}

template <int K>
__device__ __forceinline__ void StateColumns<K>::spoil_wrong_checkpoints(const Problem& p) const {
  if (p.checkpoints.states.ptr == nullptr) return;
  store_checkpoints<K>(p, nullptr, *this, kWrongCheckpoint);
}

}  // namespace flashkda::cuda
