// The recurrence over a few tokens. A work item is kSliceV columns of one head's state, which do
// not depend on the others, over all tokens of a sequence: they are loaded once, stay in registers,
// and are stored once.
//
// A block works on items blockIdx, blockIdx + gridDim, ... in blocks of tokens. While it works on
// one, the inputs of the next block of tokens and, behind an item's last, the state of the next
// item are on their way: the state in shared memory, where it costs no registers.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/divide.cuh"
#include "../../common/params.h"
#include "../../common/warp.cuh"
#include "config.h"
#include "state.cuh"
#include "tokens.cuh"

namespace flashkda::cuda::sm80::decode {

struct Params {
  Problem p;
  Pool pool;
  int items;
  Divider slices, HV, heads_per_key;    // V / kSliceV, HV, HV / H
  bool initial_aligned, final_aligned;  // 16-byte vectors can be used
};

constexpr int64_t kNoRow = -1;

__device__ __forceinline__ int64_t slot_of(const Pool& pool, int64_t n, int64_t t) {
  return load_index(pool.state_indices, n * pool.stride_n + t * pool.stride_t,
                    pool.state_indices_64);
}

__device__ __forceinline__ bool slot_valid(int64_t slot, const StateTensor& states) {
  return slot >= kNoRow && slot < states.size;
}

__device__ __forceinline__ bool keeps_every_state(const Pool& pool) {
  return pool.in_place && pool.per_token;
}

struct Item {
  int64_t n;  // sequence
  int hv, slice;
  int64_t b, begin;  // batch row and its first token
  int length;        // tokens
  int64_t o_at;      // element of o where the next one goes
  int64_t source;    // row of the state to start from, kNoRow: zero
  int64_t target;    // row that takes the state after the last token, kNoRow: none
  // 1: no index is out of range. 0: the output is NaN and no row of a pool is touched. Not a bool,
  // as those are packed and unpacked where they live across a loop.
  int valid;
};

__device__ __forceinline__ Item find_item(const Params& params, int index) {
  const Problem& p = params.p;
  const Pool& pool = params.pool;
  // Slices of a head, then heads, lie next to each other in memory and are worked on at the same
  // time.
  const int head = params.slices.divide(index);
  const int n = params.HV.divide(head);
  Item item;
  item.slice = index - head * (p.V / kSliceV);
  item.hv = head - n * p.HV;
  item.n = n;

  item.b = item.n;
  item.begin = 0;
  item.length = static_cast<int>(p.T);
  if (p.cu_seqlens != nullptr) {
    // Nothing has checked what lies on the device: what is not within the tokens is taken for
    // empty.
    item.b = 0;
    item.begin = load_index(p.cu_seqlens, item.n, p.cu_seqlens_64);
    const int64_t end = load_index(p.cu_seqlens, item.n + 1, p.cu_seqlens_64);
    const bool within = item.begin >= 0 && item.begin <= end && end <= p.T;
    item.length = within ? static_cast<int>(end - item.begin) : 0;
  }

  item.o_at = item.b * p.o.stride_b + item.begin * p.o.stride_t + item.hv * p.o.stride_h +
              item.slice * kSliceV;

  item.source = item.target = item.n;
  item.valid = true;
  if (pool.state_indices != nullptr) {
    int64_t t = 0;
    if (pool.per_token) {
      if (pool.num_accepted_tokens != nullptr) {
        t = load_index(pool.num_accepted_tokens, item.n, pool.num_accepted_tokens_64) - 1;
      }
      item.valid = t >= 0 && t < pool.width;
    }
    item.source = item.valid ? slot_of(pool, item.n, t) : kNoRow;
    item.valid = item.valid && slot_valid(item.source, p.initial_state);
    if (keeps_every_state(pool)) {
      bool valid = true;
      for (int i = threadIdx.x % 32; i < item.length && i < pool.width; i += 32) {
        valid = valid && slot_valid(slot_of(pool, item.n, i), p.final_state);
      }
      item.valid = __all_sync(~0u, valid) && item.valid;
    }
    if (pool.in_place) item.target = item.source;
  }
  if (p.initial_state.ptr == nullptr) item.source = kNoRow;
  if (p.final_state.ptr == nullptr || keeps_every_state(pool)) item.target = kNoRow;
  if (pool.in_place && (!item.valid || item.length == 0)) item.target = kNoRow;
  return item;
}

// One token, in the letters of docs/architecture.md, with S' = Diag(decay) S:
//
//   u = beta (v - S'^T k)    S = S' + k u^T    o = scale S^T q = scale (S'^T q + (q.k) u)
//
// so that both sums over K are taken of S' at once. `reduced` is scratch that must not be in use by
// a step whose results some thread has not seen yet.
template <DType kIn, int K>
__device__ __forceinline__ void step(StateSlice<kIn, K, false>& state, const Token<K>& token,
                                     const Problem& p, int64_t o_at,
                                     float (&reduced)[2][kWarps][kSliceV]) {
  using Slice = StateSlice<kIn, K, false>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = Slice::row(0);
  float sk[Slice::kWidth] = {}, sq[Slice::kWidth] = {};
#pragma unroll
  for (int i = 0; i < Slice::kVectors; ++i) {
    const float decay = token.decay[row + i], k = token.k[row + i], q = token.q[row + i];
#pragma unroll
    for (int j = 0; j < Slice::kWidth; ++j) {
      state.s[i][j] *= decay;
      sk[j] += state.s[i][j] * k;
      sq[j] += state.s[i][j] * q;
    }
  }
  static_assert(Slice::kGroups == Slice::kWidth, "as many sums as lanes that share them");
  const int own = Slice::column() + lane / Slice::kLanes;
  reduced[0][warp][own] = transposed_sum(sk, lane, Slice::kLanes);
  reduced[1][warp][own] = transposed_sum(sq, lane, Slice::kLanes);
  const Sums sums = token_sums(token, p.l2norm);
  __syncthreads();

  // From here on a lane stands for one column of the slice, in every warp.
  float k_S = 0.f, q_S = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    k_S += reduced[0][w][lane];
    q_S += reduced[1][w][lane];
  }
  const float u = token.beta * (token.v[lane] - sums.k_norm * k_S);
  const float ku = sums.k_norm * u;
  if (warp == 0) {
    store_float(p.o.ptr, o_at + lane, p.o.dtype, p.scale * sums.q_norm * (q_S + sums.qk * ku));
  }
  float ku_of[Slice::kWidth];
#pragma unroll
  for (int j = 0; j < Slice::kWidth; ++j) ku_of[j] = __shfl_sync(~0u, ku, Slice::column() + j);
#pragma unroll
  for (int i = 0; i < Slice::kVectors; ++i) {
    const float k = token.k[row + i];
#pragma unroll
    for (int j = 0; j < Slice::kWidth; ++j) state.s[i][j] += k * ku_of[j];
  }
}

// The same with rows of S^T: the sums stay within a warp.
template <DType kIn, int K>
__device__ __forceinline__ void step(StateSlice<kIn, K, true>& state, const Token<K>& token,
                                     const Problem& p, int64_t o_at,
                                     float (&)[2][kWarps][kSliceV]) {
  using Slice = StateSlice<kIn, K, true>;
  const int lane = threadIdx.x % 32;
  const int channel = Slice::column();
  float sk[Slice::kVectors] = {}, sq[Slice::kVectors] = {};
#pragma unroll
  for (int j = 0; j < Slice::kWidth; ++j) {
    const float decay = token.decay[channel + j], k = token.k[channel + j];
    const float q = token.q[channel + j];
#pragma unroll
    for (int i = 0; i < Slice::kVectors; ++i) {
      state.s[i][j] *= decay;
      sk[i] += state.s[i][j] * k;
      sq[i] += state.s[i][j] * q;
    }
  }
  float k_S = transposed_sum(sk, lane, 1), q_S = transposed_sum(sq, lane, 1);
#pragma unroll
  for (int mask = Slice::kVectors; mask < Slice::kLanes; mask *= 2) {
    k_S += __shfl_xor_sync(~0u, k_S, mask);
    q_S += __shfl_xor_sync(~0u, q_S, mask);
  }

  // From here on a lane stands for the row of its vector number lane % kVectors.
  const Sums sums = token_sums(token, p.l2norm);
  const int own = Slice::row(lane % Slice::kVectors);
  const float u = token.beta * (token.v[own] - sums.k_norm * k_S);
  const float ku = sums.k_norm * u;
  if (lane % Slice::kLanes < Slice::kVectors) {
    store_float(p.o.ptr, o_at + own, p.o.dtype, p.scale * sums.q_norm * (q_S + sums.qk * ku));
  }
#pragma unroll
  for (int i = 0; i < Slice::kVectors; ++i) {
    const float ku_of = __shfl_sync(~0u, ku, lane - lane % Slice::kLanes + i);
#pragma unroll
    for (int j = 0; j < Slice::kWidth; ++j) state.s[i][j] += token.k[channel + j] * ku_of;
  }
}

template <DType kIn, int K, bool kVFirst>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    recurrent_kda_kernel(const __grid_constant__ Params params) {
  using Slice = StateSlice<kIn, K, kVFirst>;
  __shared__ typename Slice::Stage stage;
  __shared__ Token<K> tokens[2][kBlockTokens];
  __shared__ float reduced[2][2][kWarps][kSliceV];
  const Problem& p = params.p;
  const Pool& pool = params.pool;

  Slice state;
  TokenReader<K> reader(p);
  // Element of a state tensor's row where a thread's part of an item begins.
  auto element_of = [&](const Item& item) {
    return static_cast<int64_t>(item.hv) * K * p.V + Slice::first_element(item.slice, p.V);
  };
  Item item = {};  // none yet: no tokens, no state
  item.target = kNoRow;
  int next_index = blockIdx.x;
  int t = 0;       // the first token of the block of tokens
  int buffer = 0;  // where these tokens are
  while (true) {
    // Ask for what comes next.
    int more = 1;
    Item next = item;
    int next_t = t + kBlockTokens;
    if (next_t >= item.length) {
      more = next_index < params.items;
      if (more) {
        next = find_item(params, next_index);
        next_index += gridDim.x;
        next_t = 0;
        if (next.valid && next.source != kNoRow) {
          Slice::load(stage, p.initial_state.ptr,
                      next.source * p.initial_state.stride_n + element_of(next), p.V,
                      params.initial_aligned);
        } else {
          Slice::load_constant(stage, !next.valid);
        }
        reader.seek(params.heads_per_key.divide(next.hv), next.hv, next.slice, next.b, next.begin);
      }
    }
    if (more) reader.fetch(next.length - next_t);

    for (int i = 0;; ++i) {
      // The state after t + i tokens.
      int64_t row = t + i == item.length ? item.target : kNoRow;
      if (keeps_every_state(pool) && item.valid && i > 0 && t + i <= pool.width) {
        row = slot_of(pool, item.n, t + i - 1);
      }
      if (row != kNoRow) {
        state.store(p.final_state.ptr, row * p.final_state.stride_n + element_of(item), p.V,
                    p.final_state.dtype, params.final_aligned);
      }
      if (i == kBlockTokens || t + i == item.length) break;
      step(state, tokens[buffer][i], p, item.o_at, reduced[i % 2]);
      item.o_at += p.o.stride_t;
    }
    if (!more) break;

    // The other warps may still be at the tokens of this buffer, but not at those of the other.
    buffer ^= 1;
    if (next_t > 0) next.o_at = item.o_at;
    item = next;
    t = next_t;
    reader.publish(tokens[buffer], item.length - t);
    if (t == 0) state.take(stage);
    __syncthreads();
  }
}

}  // namespace flashkda::cuda::sm80::decode
