// What a chain's warp holds of a state: 16 value columns of one sequence and head, S^T in the
// accumulators of m16n8 products (and of wgmma's, warp by warp). Loads it, stores it, and keeps the
// states inside the sequence that are asked for.
#pragma once

#include "convert.cuh"
#include "ptx.cuh"
#include "states.cuh"

namespace flashkda::cuda {

template <int K>
struct StateColumns {
  static constexpr int kTiles = K / 8;  // of the accumulators: eight channels each

  int n, tokens;  // the sequence and its length; more than 2^31 tokens fit no GPU's memory
  int hv;
  int v;  // the first column
  int lane;

  // Where element i of tile t lies in a row of a state tensor.
  __device__ __forceinline__ int place(const Problem& p, int t, int i) const {
    const int c = v + lane / 4 + (i / 2) * 8;
    const int d = t * 8 + (lane % 4) * 2 + (i & 1);
    return hv * K * p.V + (p.state_v_first ? c * K + d : d * p.V + c);
  }

  __device__ __forceinline__ void load(const Problem& p, float (&S)[kTiles][4]) const {
    const StateTensor& x = p.initial_state;
    const int64_t row = first_row(p, n);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = row * x.stride_n + place(p, t, i);
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
    // Places found anew: kept from `load` on they would take all registers.
    StateColumns here = *this;
    here.lane = ptx::opaque(lane);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        store_float(x.ptr, row * x.stride_n + here.place(p, t, i), x.dtype, S[t][i]);
    }
  }

  // A chain counts down what is left of its sequence. With how much left it comes to a unit,
  // INT_MIN if there is none.
  __device__ __forceinline__ int left_at(int unit) const {
    return unit == kNoCheckpoint ? INT_MIN : tokens - unit * kCheckpointUnit;
  }
  __device__ __forceinline__ int unit_at(int left) const {
    return (tokens - left) / kCheckpointUnit;
  }

  // With how much left the first checkpoint lies; and, the state there stored, the next.
  __device__ __forceinline__ int first_stop(const Problem& p) const;
  __device__ __forceinline__ int keep(const Problem& p, const float (&S)[kTiles][4],
                                      int left) const;

  // Once: NaN where an offset is wrong.
  __device__ __forceinline__ void spoil_wrong_checkpoints(const Problem& p) const;
};

// Stores the state wherever it is wanted before a unit, and returns with how much left of the
// sequence it is wanted next. S is a copy in local memory; it is null, and NaN stored, for
// kWrongCheckpoint. Not inlined, lest the addresses of all elements be found beforehand and spilled
// around every step; and its loop is not unrolled, because what registers it takes, the steps lack.
template <int K>
__device__ __noinline__ int store_checkpoints(const Problem& p, const float4* S,
                                              StateColumns<K> columns, int unit) {
  const StateTensor& x = p.checkpoints.states;
  const DType dtype = x.dtype;
  const int stride_d = p.state_v_first ? 1 : p.V, stride_c = p.state_v_first ? K : 1;
  const int first = columns.place(p, 0, 0);
  const auto store_tiles = [&](const auto& store) {
#pragma unroll 1
    for (int t = 0; t < K / 8; ++t) {
      const float nan = first_value(kFromNaN);
      const float4 y = unit == kWrongCheckpoint ? make_float4(nan, nan, nan, nan) : S[t];
      const int at = first + 8 * t * stride_d;
      store(at, y.x);
      store(at + stride_d, y.y);
      store(at + 8 * stride_c, y.z);
      store(at + 8 * stride_c + stride_d, y.w);
    }
  };
  const auto store = [&](int64_t row) {
    const int64_t begin = row * x.stride_n;
    if (dtype == DType::kF32) {
      float* const to = static_cast<float*>(x.ptr) + begin;
      store_tiles([&](int at, float y) { to[at] = y; });
    } else {
      uint16_t* const to = static_cast<uint16_t*>(x.ptr) + begin;
      store_tiles([&](int at, float y) { store_float(to, at, dtype, y); });
    }
  };
  const LoadedCheckpoints<int64_t> loaded = {p, columns.n, columns.tokens, columns.lane};
  Checkpoint at = first_checkpoint(p, loaded, columns.tokens, unit, columns.lane);
  while (at.unit == unit) {
    const int64_t row = row_of(p, loaded, at.c);
    if (row >= 0) store(row);
    at = next_checkpoint(p, loaded, columns.tokens, at, columns.lane);
  }
  return columns.left_at(at.unit);
}

template <int K>
__device__ __forceinline__ int StateColumns<K>::first_stop(const Problem& p) const {
  if (p.checkpoints.states.ptr == nullptr) return INT_MIN;
  return store_checkpoints<K>(p, nullptr, *this, kBeforeAll);
}

template <int K>
__device__ __forceinline__ int StateColumns<K>::keep(const Problem& p, const float (&S)[kTiles][4],
                                                     int left) const {
  float4 copy[kTiles];
#pragma unroll
  for (int t = 0; t < kTiles; ++t) copy[t] = make_float4(S[t][0], S[t][1], S[t][2], S[t][3]);
  return store_checkpoints<K>(p, copy, *this, unit_at(left));
}

template <int K>
__device__ __forceinline__ void StateColumns<K>::spoil_wrong_checkpoints(const Problem& p) const {
  if (p.checkpoints.states.ptr == nullptr) return;
  store_checkpoints<K>(p, nullptr, *this, kWrongCheckpoint);
}

}  // namespace flashkda::cuda
