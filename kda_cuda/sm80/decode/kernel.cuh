// The recurrence over any tokens. A block works on kSliceV columns of one head's state, which do
// not depend on the others, over all tokens of a sequence: they are loaded once, stay in registers,
// and are stored once.
//
// Every load of a block is issued before the first is waited for, and blocks are many and short:
// while one computes, others load and store.
#pragma once

#include "../../common/convert.cuh"
#include "config.h"
#include "params.h"
#include "rows.cuh"
#include "state.cuh"
#include "step.cuh"
#include "tokens.cuh"

namespace flashkda::cuda::sm80::decode {

struct Item {
  uint32_t n;  // sequence
  uint32_t hv, slice;
  uint32_t b;     // batch row
  int64_t begin;  // its first token in that row
  int length;     // tokens
};

__device__ __forceinline__ Item find_item(const Params& p, uint32_t n) {
  // Slices of a head, then heads, lie next to each other in memory and are worked on at the same
  // time.
  Item item;
  item.slice = blockIdx.x & ((1u << p.log2_slices) - 1);
  item.hv = blockIdx.x >> p.log2_slices;
  item.n = item.b = n;
  item.begin = 0;
  item.length = static_cast<int>(p.T);
  if (p.cu_seqlens != nullptr) {
    // Nothing has checked what lies on the device: what is not within the tokens is taken for
    // empty.
    item.b = 0;
    item.begin = load_index<false>(p.cu_seqlens, item.n, p.cu_seqlens_64);
    const int64_t end = load_index<false>(p.cu_seqlens, int64_t{item.n} + 1, p.cu_seqlens_64);
    const bool within = item.begin >= 0 && item.begin <= end && end <= p.T;
    item.length = within ? static_cast<int>(end - item.begin) : 0;
  }
  return item;
}

template <DType kIn, int K, bool kVFirst>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    recurrent_kda_kernel(const __grid_constant__ Params p) {
  using Slice = StateSlice<kIn, K, kVFirst>;
  __shared__ Token<K, kSliceV> tokens[2][kBlockTokens];
  __shared__ Scratch scratch;

  start_beside();
  const uint32_t n = blockIdx.z * gridDim.y + blockIdx.y;
  if (n >= p.N) return;
  const Item item = find_item(p, n);
  const uint32_t first = item.hv * K * p.V + Slice::first_element(item.slice, p.V);
  TokenReader<K, kSliceV, kBlockTokens> reader(p, p.heads_per_key.divide(item.hv), item.hv,
                                               item.slice, item.b, item.begin);
  reader.fetch(item.length);
  // Behind the tokens' loads, as an index, where there is one, has to arrive first.
  const Rows rows = find_rows(p, item.n, item.length);
  typename Slice::Loaded loaded;
  Slice::load_source(loaded, rows, p.initial_state, first, p.V, p.initial_aligned);

  reader.publish(tokens[0], item.length);
  __syncthreads();
  Slice state;
  state.take(loaded);
  int64_t o_at = element(p.o, item.b, item.begin, item.hv) + item.slice * kSliceV;
  auto store = [&](int64_t row) {
    state.store(p.final_state.ptr, row * p.final_state.stride_n + first, p.V,
                static_cast<DType>(p.final_dtype), p.final_aligned);
  };
  const bool keeps = keeps_every_state(p) && rows.valid;
  int buffer = 0;
#pragma unroll 1
  for (int t = 0; t < item.length;) {
    const int left = item.length - t - kBlockTokens;
    if (left > 0) reader.fetch(left);
#pragma unroll 1
    for (int i = 0; i < kBlockTokens && t < item.length; ++i, ++t) {
      if (!kVFirst && i > 0) __syncthreads();
      step(state, tokens[buffer][i], p, o_at, scratch);
      o_at += p.o.stride_t;
      if (keeps && t < p.indices_width) {
        const int64_t row = slot_of(p, item.n, t);
        if (row != kNoRow) store(row);
      }
    }
    if (left > 0) {
      // The other warps may still be at the tokens of this buffer, but not at those of the other.
      buffer ^= 1;
      reader.publish(tokens[buffer], left);
      __syncthreads();
    }
  }
  if (rows.target != kNoRow) store(rows.target);
}

}  // namespace flashkda::cuda::sm80::decode
