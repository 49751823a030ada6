// The recurrence over a few tokens. A block owns kSliceV columns of one head's state, which do not
// depend on the others: it loads them once, keeps them in registers over the sequence's tokens and
// stores them once.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/params.h"
#include "../../common/warp.cuh"
#include "config.h"
#include "state.cuh"
#include "tokens.cuh"

namespace flashkda::cuda::sm80::decode {

struct Params {
  Problem p;
  Pool pool;
  bool initial_aligned, final_aligned;  // 16-byte vectors can be used
};

constexpr int64_t kNoRow = -1;

// Where sequence n's tokens and states lie.
struct Sequence {
  int64_t b, begin;  // batch row and its first token
  int length;
  int64_t source;  // row of the state to start from, kNoRow: zero
  int64_t target;  // row that takes the state after the last token, kNoRow: none
  bool valid;      // no index is out of range
};

__device__ __forceinline__ bool row_exists(int64_t row, const StateTensor& states) {
  return row >= 0 && row < states.size;
}

__device__ __forceinline__ int64_t slot_of(const Pool& pool, int64_t n, int64_t t) {
  return load_index(pool.state_indices, n * pool.stride_n + t * pool.stride_t,
                    pool.state_indices_64);
}

// Does not wait for cu_seqlens, which the state does not depend on.
__device__ __forceinline__ Sequence find_sequence(const Problem& p, const Pool& pool, int64_t n) {
  Sequence seq{n, 0, static_cast<int>(p.T), n, n, true};
  if (p.cu_seqlens != nullptr) {
    // Nothing has checked what lies on the device: what is not within the tokens is taken for
    // empty.
    const int64_t begin = load_index(p.cu_seqlens, n, p.cu_seqlens_64);
    const int64_t end = load_index(p.cu_seqlens, n + 1, p.cu_seqlens_64);
    const bool within = begin >= 0 && begin <= end && end <= p.T;
    seq.b = 0;
    seq.begin = begin;
    seq.length = within ? static_cast<int>(end - begin) : 0;
  }
  if (pool.state_indices != nullptr) {
    int64_t t = 0;
    if (pool.per_token) {
      if (pool.num_accepted_tokens != nullptr) {
        t = load_index(pool.num_accepted_tokens, n, pool.num_accepted_tokens_64) - 1;
      }
      seq.valid = t >= 0 && t < pool.width;
    }
    seq.source = seq.valid ? slot_of(pool, n, t) : kNoRow;
    seq.valid = seq.valid && (seq.source == kNoRow || row_exists(seq.source, p.initial_state));
    if (pool.in_place) seq.target = pool.per_token ? kNoRow : seq.source;
  }
  if (p.initial_state.ptr == nullptr) seq.source = kNoRow;
  if (p.final_state.ptr == nullptr) seq.target = kNoRow;
  return seq;
}

// Whether the rows that take the states after each token exist or are kNoRow. The same for all
// threads of a warp.
__device__ __forceinline__ bool slots_valid(const Problem& p, const Pool& pool, int64_t n,
                                            int length) {
  bool valid = true;
  for (int t = threadIdx.x % 32; t < length && t < pool.width; t += 32) {
    const int64_t slot = slot_of(pool, n, t);
    valid = valid && (slot == kNoRow || row_exists(slot, p.final_state));
  }
  return __all_sync(~0u, valid);
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
  const int row = Slice::row(warp, lane, 0);
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
  const int own = Slice::column(lane) + lane / Slice::kLanes;
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
  for (int j = 0; j < Slice::kWidth; ++j) ku_of[j] = __shfl_sync(~0u, ku, Slice::column(lane) + j);
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
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int channel = Slice::column(lane);
  float sk[Slice::kVectors] = {}, sq[Slice::kVectors] = {};
#pragma unroll
  for (int j = 0; j < Slice::kWidth; ++j) {
    const float decay = token.decay[channel + j], k = token.k[channel + j],
                q = token.q[channel + j];
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
  const int own = Slice::row(warp, lane, lane % Slice::kVectors);
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
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    recurrent_kda_kernel(const __grid_constant__ Params params) {
  __shared__ Token<K> tokens[2][kBlockTokens];
  __shared__ float reduced[2][2][kWarps][kSliceV];
  const Problem& p = params.p;
  const Pool& pool = params.pool;

  // Slices of a head, then heads, lie next to each other in memory and run at the same time.
  const int slices = p.V / kSliceV;
  const int slice = blockIdx.x % slices;
  const int head = blockIdx.x / slices;
  const int hv = head % p.HV;
  const int64_t n = head / p.HV;
  const int64_t head_offset = static_cast<int64_t>(hv) * p.K * p.V;

  Sequence seq = find_sequence(p, pool, n);
  StateSlice<kIn, K, kVFirst> state(threadIdx.x / 32, threadIdx.x % 32, slice, p.V);
  const bool loads = seq.valid && seq.source != kNoRow;
  if (loads) {
    state.load(p.initial_state.ptr, seq.source * p.initial_state.stride_n + head_offset,
               params.initial_aligned);
  }
  TokenReader<K> reader(p, hv, slice);
  reader.seek(seq.b, seq.begin);
  reader.fetch(seq.length);

  const bool keeps_all = pool.in_place && pool.per_token;
  if (keeps_all) seq.valid = seq.valid && slots_valid(p, pool, n, seq.length);
  int64_t o_at =
      seq.b * p.o.stride_b + seq.begin * p.o.stride_t + hv * p.o.stride_h + slice * kSliceV;
  if (!seq.valid) {
    for (int t = threadIdx.x / 32; t < seq.length; t += kWarps) {
      store_float(p.o.ptr, o_at + t * p.o.stride_t + threadIdx.x % 32, p.o.dtype,
                  __int_as_float(0x7fc00000));
    }
    if (pool.in_place || seq.target == kNoRow) return;
    state.fill(__int_as_float(0x7fc00000));
    state.store(p.final_state.ptr, seq.target * p.final_state.stride_n + head_offset,
                p.final_state.dtype, params.final_aligned);
    return;
  }

  reader.publish(tokens[0], seq.length);
  if (loads) {
    state.unpack();
  } else {
    state.fill(0.f);
  }
  for (int t = 0; t < seq.length; ++t) {
    const int in_block = t % kBlockTokens, buffer = t / kBlockTokens % 2;
    const int ahead = seq.length - (t - in_block) - kBlockTokens;  // tokens behind this block
    if (in_block == 0) {
      // The block's tokens are there, and the other buffer's have been used by every thread.
      __syncthreads();
      reader.fetch(ahead);
    }
    step(state, tokens[buffer][in_block], p, o_at, reduced[t % 2]);
    if (keeps_all && t < pool.width) {
      const int64_t slot = slot_of(pool, n, t);
      if (slot != kNoRow) {
        state.store(p.final_state.ptr, slot * p.final_state.stride_n + head_offset,
                    p.final_state.dtype, params.final_aligned);
      }
    }
    if (in_block == kBlockTokens - 1) reader.publish(tokens[buffer ^ 1], ahead);
    o_at += p.o.stride_t;
  }
  if (seq.target != kNoRow && !(pool.in_place && seq.length == 0)) {
    state.store(p.final_state.ptr, seq.target * p.final_state.stride_n + head_offset,
                p.final_state.dtype, params.final_aligned);
  }
}

}  // namespace flashkda::cuda::sm80::decode
