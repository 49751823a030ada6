// A token's step on the slice of the state that a block holds in registers.
#pragma once

#include "config.h"
#include "params.h"
#include "state.cuh"
#include "sums.cuh"

namespace flashkda::cuda::sm80::decode {

struct Scratch {
  float k_S[kWarps][kSliceV], q_S[kWarps][kSliceV];  // sums over a warp's channels, of [K, V]
};

// One token. Between two steps that use `scratch` is a barrier.
template <DType kIn, int K, class Token>
__device__ __forceinline__ void step(StateSlice<kIn, K, false>& state, const Token& token,
                                     const Params& p, int64_t o_at, Scratch& scratch) {
  using Slice = StateSlice<kIn, K, false>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  RowSums<Slice> sums;
  static_assert(sums.kOwn == 1, "as many sums as lanes that share them");
  sums.add_all(token, [&](int i, float growth) -> const float (&)[Slice::kWidth] {
#pragma unroll
    for (float& x : state.s[i]) x = decayed(x, growth);
    return state.s[i];
  });
  sums.sum_over_warp();
  scratch.k_S[warp][sums.own()] = sums.k[0][0];
  scratch.q_S[warp][sums.own()] = sums.q[0][0];
  __syncthreads();

  // From here on a lane stands for one column of the slice, in every warp.
  const Column column =
      finish_column(p, norms_of(token, p.l2norm), token.beta, token.v[lane],
                    sum_of_warps(scratch.k_S, lane), sum_of_warps(scratch.q_S, lane));
  if (warp == 0) store_float(p.o.ptr, o_at + lane, static_cast<DType>(p.dtype), column.o);
  float ku[Slice::kWidth];
#pragma unroll
  for (int j = 0; j < Slice::kWidth; ++j) {
    ku[j] = __shfl_sync(~0u, column.ku, Slice::column() + j);
  }
#pragma unroll
  for (int first = 0; first < Slice::kVectors; first += Slice::kRun) {
    float k[Slice::kRun];
    load_adjacent(k, token.k + Slice::row(first));
#pragma unroll
    for (int i = 0; i < Slice::kRun; ++i) {
#pragma unroll
      for (int j = 0; j < Slice::kWidth; ++j) {
        state.s[first + i][j] = fmaf(k[i], ku[j], state.s[first + i][j]);
      }
    }
  }
}

template <DType kIn, int K, class Token>
__device__ __forceinline__ void step(StateSlice<kIn, K, true>& state, const Token& token,
                                     const Params& p, int64_t o_at, Scratch&) {
  step_on_rows<StateSlice<kIn, K, true>>(state.s, 0, token, norms_of(token, p.l2norm), p, o_at);
}

}  // namespace flashkda::cuda::sm80::decode
