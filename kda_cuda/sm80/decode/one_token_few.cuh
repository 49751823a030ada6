// What one_token.cuh serves, for so few sequences that all blocks fit the GPU at once. Then every
// load is under way from the start, wherever the state waits, and it waits in registers: what
// stands between its arrival and its end is shorter than by way of shared memory.
#pragma once

#include "config.h"
#include "params.h"
#include "rows.cuh"
#include "state.cuh"
#include "step.cuh"
#include "tokens.cuh"

namespace flashkda::cuda::sm80::decode {

template <DType kState, int K, bool kVFirst>
__global__ void __launch_bounds__(kThreads, kFewBlocks)
    one_token_few_kda_kernel(const __grid_constant__ Params p) {
  constexpr int kSlices = K / kSliceV;
  using Slice = StateSlice<kState, K, kVFirst>;
  __shared__ Token<K, kSliceV> token;
  __shared__ Scratch scratch;

  start_beside();
  const uint32_t n = blockIdx.y, slice = blockIdx.x % kSlices, hv = blockIdx.x / kSlices;
  TokenReader<K, kSliceV, 1> reader(p, p.heads_per_key.divide(hv), hv, slice, n, 0);
  // Before the state's loads: behind those of all blocks of a multiprocessor the token would come
  // last, and its activation would be waited for.
  reader.fetch(1);
  const Rows rows = find_row(p, n);
  const uint32_t first = hv * K * K + Slice::first_element(slice, K);
  typename Slice::Loaded loaded;
  Slice::load_source(loaded, rows, p.initial_state, first, K, true);

  reader.publish(&token, 1);
  __syncthreads();
  Slice state;
  state.take(loaded);
  step(state, token, p, element(p.o, n, 0, hv) + slice * kSliceV, scratch);
  if (rows.target != kNoRow) {
    state.store(p.final_state.ptr, rows.target * p.final_state.stride_n + first, K, kState, true);
  }
}

}  // namespace flashkda::cuda::sm80::decode
