// The recurrence over one token a sequence, K = V, states of one dtype whose rows 16-byte vectors
// fit. A block has some columns of one head's state.
//
// The state waits in shared memory, not in registers, so that more of it can be on its way, and is
// read there again where it is updated. A thread reads back what it copied itself.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "../../common/convert.cuh"
#include "config.h"
#include "params.h"
#include "rows.cuh"
#include "slice.cuh"
#include "sums.cuh"
#include "tokens.cuh"

namespace flashkda::cuda::sm80::decode {

template <class Slice, int kColumns>
struct Block {
  uint4 state[Slice::kVectors][kThreads];
  float k_S[kWarps][kColumns], q_S[kWarps][kColumns];  // sums over a warp's channels, of [K, V]
  float ku[kColumns];

  __device__ __forceinline__ void load_row(float (&s)[Slice::kWidth], int i) const {
    unpack(s, state[i][threadIdx.x]);
  }
};

// put(i, s) takes vector i of the new state.
template <class Slice, int kColumns, class Token, class Put>
__device__ __forceinline__ void step_k_first(Block<Slice, kColumns>& block, const Token& token,
                                             const Params& p, int64_t o_at, Put put) {
  const int warp = threadIdx.x / 32;
  RowSums<Slice> sums;
  float s[Slice::kWidth];
  sums.add_all(token, [&](int i, float growth) -> const float (&)[Slice::kWidth] {
    block.load_row(s, i);
#pragma unroll
    for (float& x : s) x = decayed(x, growth);
    return s;
  });
  sums.sum_over_warp();
#pragma unroll
  for (int j = 0; j < sums.kOwn; ++j) {
    block.k_S[warp][sums.own() + j] = sums.k[0][j];
    block.q_S[warp][sums.own() + j] = sums.q[0][j];
  }
  __syncthreads();
  if (const int c = threadIdx.x; c < kColumns) {
    const Column column = finish_column(p, norms_of(token, p.l2norm), token.beta, token.v[c],
                                        sum_of_warps(block.k_S, c), sum_of_warps(block.q_S, c));
    block.ku[c] = column.ku;
    store_float(p.o.ptr, o_at + c, static_cast<DType>(p.dtype), column.o);
  }
  __syncthreads();
  float ku[Slice::kWidth];
  load_adjacent(ku, block.ku + Slice::column());
#pragma unroll
  for (int run = 0; run < Slice::kRuns; ++run) {
    const int first = run * Slice::kRun, channel = Slice::row(first);
    float growth[Slice::kRun], k[Slice::kRun];
    load_adjacent(growth, token.growth + channel);
    load_adjacent(k, token.k + channel);
#pragma unroll
    for (int i = 0; i < Slice::kRun; ++i) {
      float s[Slice::kWidth];
      block.load_row(s, first + i);
#pragma unroll
      for (int j = 0; j < Slice::kWidth; ++j) s[j] = fmaf(k[i], ku[j], decayed(s[j], growth[i]));
      put(first + i, s);
    }
  }
}

template <class Slice, int kColumns, class Token, class Put>
__device__ __forceinline__ void step_v_first(const Block<Slice, kColumns>& block,
                                             const Token& token, const Params& p, int64_t o_at,
                                             Put put) {
  const Norms norms = norms_of(token, p.l2norm);
  constexpr int kCount = 8 / Slice::kGroups;
#pragma unroll 1
  for (int first = 0; first < Slice::kVectors; first += kCount) {
    float s[kCount][Slice::kWidth];
#pragma unroll
    for (int i = 0; i < kCount; ++i) block.load_row(s[i], first + i);
    step_on_rows<Slice>(s, first, token, norms, p, o_at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) put(first + i, s[i]);
  }
}

template <DType kState, int K, bool kVFirst>
__global__ void __launch_bounds__(kThreads, kOneTokenBlocks)
    one_token_kda_kernel(const __grid_constant__ Params p) {
  constexpr int kColumns = kOneTokenColumns, kSlices = K / kColumns;
  constexpr int kElement = kState == DType::kF32 ? 4 : 2;
  using Slice = SliceMap<kState, K, kVFirst, kColumns>;
  __shared__ Block<Slice, kColumns> block;
  __shared__ Token<K, kColumns> token;

  start_beside();
  const uint32_t n = blockIdx.z * gridDim.y + blockIdx.y;
  if (n >= p.N) return;
  const uint32_t slice = blockIdx.x % kSlices, hv = blockIdx.x / kSlices;
  TokenReader<K, kColumns, 1> reader(p, p.heads_per_key.divide(hv), hv, slice, n, 0);
  reader.fetch(1);
  // Behind the token's loads, as an index, where there is one, has to arrive first.
  const Rows rows = find_row(p, n);
  const int64_t first = hv * K * K + Slice::first_element(slice, K);
  if (rows.valid && rows.source != kNoRow) {
    const char* from = static_cast<const char*>(p.initial_state.ptr) +
                       (rows.source * p.initial_state.stride_n + first) * kElement;
#pragma unroll
    for (int i = 0; i < Slice::kVectors; ++i) {
      __pipeline_memcpy_async(&block.state[i][threadIdx.x], from + Slice::offset(i, K) * kElement,
                              16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Slice::kVectors; ++i) {
      block.state[i][threadIdx.x] = constant_vector(!rows.valid);
    }
  }
  __pipeline_commit();

  reader.publish(&token, 1);
  __pipeline_wait_prior(0);
  __syncthreads();
  char* to = static_cast<char*>(p.final_state.ptr) +
             (rows.target * p.final_state.stride_n + first) * kElement;
  auto put = [&](int i, const float (&s)[Slice::kWidth]) {
    if (rows.target == kNoRow) return;
    *reinterpret_cast<uint4*>(to + Slice::offset(i, K) * kElement) = pack(s);
  };
  const int64_t o_at = element(p.o, n, 0, hv) + slice * kColumns;
  if constexpr (kVFirst) {
    step_v_first(block, token, p, o_at, put);
  } else {
    step_k_first(block, token, p, o_at, put);
  }
}

}  // namespace flashkda::cuda::sm80::decode
