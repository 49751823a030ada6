// The recurrence over a few tokens. A block works on kSliceV columns of one head's state, which do
// not depend on the others, over all tokens of a sequence: they are loaded once, stay in registers,
// and are stored once.
//
// Every load of a block is issued before the first is waited for, and blocks are many and short:
// while one computes, others load and store.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/warp.cuh"
#include "config.h"
#include "params.h"
#include "state.cuh"
#include "tokens.cuh"

namespace flashkda::cuda::sm80::decode {

constexpr int64_t kNoRow = -1;

__device__ __forceinline__ int64_t slot_of(const Params& p, int64_t n, int64_t t) {
  return load_index(p.state_indices, n * p.indices_stride_n + t * p.indices_stride_t,
                    p.state_indices_64);
}

__device__ __forceinline__ bool slot_valid(int64_t slot, const States& states) {
  return slot >= kNoRow && slot < states.size;
}

__device__ __forceinline__ bool keeps_every_state(const Params& p) {
  return p.in_place && p.per_token;
}

struct Item {
  uint32_t n;  // sequence
  uint32_t hv, slice;
  uint32_t b;     // batch row
  int64_t begin;  // its first token in that row
  int length;     // tokens
};

template <bool kOne>
__device__ __forceinline__ Item find_item(const Params& p, uint32_t n) {
  // Slices of a head, then heads, lie next to each other in memory and are worked on at the same
  // time.
  Item item;
  item.slice = blockIdx.x & ((1u << p.log2_slices) - 1);
  item.hv = blockIdx.x >> p.log2_slices;
  item.n = item.b = n;
  item.begin = 0;
  item.length = kOne ? 1 : static_cast<int>(p.T);
  if (!kOne && p.cu_seqlens != nullptr) {
    // Nothing has checked what lies on the device: what is not within the tokens is taken for
    // empty.
    item.b = 0;
    item.begin = load_index(p.cu_seqlens, item.n, p.cu_seqlens_64);
    const int64_t end = load_index(p.cu_seqlens, int64_t{item.n} + 1, p.cu_seqlens_64);
    const bool within = item.begin >= 0 && item.begin <= end && end <= p.T;
    item.length = within ? static_cast<int>(end - item.begin) : 0;
  }
  return item;
}

struct Rows {
  int64_t source;  // row of the state to start from, kNoRow: zero
  int64_t target;  // row that takes the state after the last token, kNoRow: none
  // No index is out of range. Else the output is NaN and no row of a pool is touched.
  bool valid;
};

template <bool kOne>
__device__ __forceinline__ Rows find_rows(const Params& p, const Item& item) {
  Rows rows{item.n, item.n, true};
  if (p.state_indices != nullptr) {
    int64_t t = 0;
    if (!kOne && p.per_token) {
      if (p.num_accepted_tokens != nullptr) {
        t = load_index(p.num_accepted_tokens, item.n, p.accepted_64) - 1;
      }
      rows.valid = t >= 0 && t < p.indices_width;
    }
    rows.source = rows.valid ? slot_of(p, item.n, t) : kNoRow;
    rows.valid = rows.valid && slot_valid(rows.source, p.initial_state);
    if (!kOne && keeps_every_state(p)) {
      bool valid = true;
      for (int i = threadIdx.x % 32; i < item.length && i < p.indices_width; i += 32) {
        valid = valid && slot_valid(slot_of(p, item.n, i), p.final_state);
      }
      rows.valid = __all_sync(~0u, valid) && rows.valid;
    }
    if (p.in_place) rows.target = rows.source;
  }
  if (p.initial_state.ptr == nullptr) rows.source = kNoRow;
  if (p.final_state.ptr == nullptr || (!kOne && keeps_every_state(p))) rows.target = kNoRow;
  if (p.in_place && (!rows.valid || item.length == 0)) rows.target = kNoRow;
  return rows;
}

// Sums that need all of K, of a token whose k and q are not normalised.
struct Norms {
  float k, q;  // what k and q are multiplied by; 1 without l2norm
  float qk;
};

__device__ __forceinline__ Norms to_norms(float kk, float qq, float qk, bool l2norm) {
  if (!l2norm) return {1.f, 1.f, qk};
  constexpr float kEps = 1e-6f;
  return {rsqrtf(kk + kEps), rsqrtf(qq + kEps), qk};
}

// Sums x[i] over the lanes that differ in the bits from `stride` to `end` of their number; the sum
// of x[i] is returned where the lowest of these bits spell i.
template <int n>
__device__ __forceinline__ float spread_sum(float (&x)[n], int lane, int stride, int end) {
  float sum = transposed_sum(x, lane, stride);
#pragma unroll
  for (int mask = n * stride; mask < end; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

template <int K>
struct Scratch {
  float k_S[kWarps][kSliceV], q_S[kWarps][kSliceV];  // sums over a warp's channels, of [K, V]
  float4 norms[kWarps];                              // k k, q q, q k over a warp's channels
};

// One token, in the letters of docs/architecture.md, with S' = Diag(decay) S:
//
//   u = beta (v - S'^T k)    S = S' + k u^T    o = scale S^T q = scale (S'^T q + (q.k) u)
//
// so that all sums over K are taken at once. Between two steps that use `scratch` is a barrier.
template <DType kIn, int K>
__device__ __forceinline__ void step(StateSlice<kIn, K, false>& state, const Token<K>& token,
                                     const Params& p, int64_t o_at, Scratch<K>& scratch) {
  using Slice = StateSlice<kIn, K, false>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = Slice::row(0);
  float sk[Slice::kWidth] = {}, sq[Slice::kWidth] = {}, norms[4] = {};
  float k[Slice::kVectors];
#pragma unroll
  for (int i = 0; i < Slice::kVectors; ++i) {
    const float growth = token.growth[row + i], q = token.q[row + i];
    k[i] = token.k[row + i];
    norms[0] += k[i] * k[i];
    norms[1] += q * q;
    norms[2] += q * k[i];
#pragma unroll
    for (int j = 0; j < Slice::kWidth; ++j) {
      state.s[i][j] = fmaf(state.s[i][j], growth, state.s[i][j]);
      sk[j] += state.s[i][j] * k[i];
      sq[j] += state.s[i][j] * q;
    }
  }
  static_assert(Slice::kGroups == Slice::kWidth, "as many sums as lanes that share them");
  const int own = Slice::column() + lane / Slice::kLanes;
  scratch.k_S[warp][own] = transposed_sum(sk, lane, Slice::kLanes);
  scratch.q_S[warp][own] = transposed_sum(sq, lane, Slice::kLanes);
  const float norm = spread_sum(norms, lane, Slice::kLanes, 32);
  if (lane % Slice::kLanes == 0 && lane / Slice::kLanes < 4) {
    reinterpret_cast<float*>(&scratch.norms[warp])[lane / Slice::kLanes] = norm;
  }
  __syncthreads();

  // From here on a lane stands for one column of the slice, in every warp.
  float k_S = 0.f, q_S = 0.f, kk = 0.f, qq = 0.f, qk = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    k_S += scratch.k_S[w][lane];
    q_S += scratch.q_S[w][lane];
    const float4 part = scratch.norms[w];
    kk += part.x;
    qq += part.y;
    qk += part.z;
  }
  const Norms norm_of = to_norms(kk, qq, qk, p.l2norm);
  const float u = token.beta * (token.v[lane] - norm_of.k * k_S);
  const float ku = norm_of.k * u;
  if (warp == 0) {
    store_float(p.o.ptr, o_at + lane, static_cast<DType>(p.dtype),
                p.scale * norm_of.q * (q_S + norm_of.qk * ku));
  }
  float ku_of[Slice::kWidth];
#pragma unroll
  for (int j = 0; j < Slice::kWidth; ++j) ku_of[j] = __shfl_sync(~0u, ku, Slice::column() + j);
#pragma unroll
  for (int i = 0; i < Slice::kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < Slice::kWidth; ++j) state.s[i][j] += k[i] * ku_of[j];
  }
}

// The same with rows of S^T: the sums stay within a warp.
template <DType kIn, int K>
__device__ __forceinline__ void step(StateSlice<kIn, K, true>& state, const Token<K>& token,
                                     const Params& p, int64_t o_at, Scratch<K>&) {
  using Slice = StateSlice<kIn, K, true>;
  const int lane = threadIdx.x % 32;
  const int channel = Slice::column();
  float sk[Slice::kVectors] = {}, sq[Slice::kVectors] = {}, norms[4] = {};
  float k[Slice::kWidth];
#pragma unroll
  for (int j = 0; j < Slice::kWidth; ++j) {
    const float growth = token.growth[channel + j], q = token.q[channel + j];
    k[j] = token.k[channel + j];
    norms[0] += k[j] * k[j];
    norms[1] += q * q;
    norms[2] += q * k[j];
#pragma unroll
    for (int i = 0; i < Slice::kVectors; ++i) {
      state.s[i][j] = fmaf(state.s[i][j], growth, state.s[i][j]);
      sk[i] += state.s[i][j] * k[j];
      sq[i] += state.s[i][j] * q;
    }
  }
  const float norm = spread_sum(norms, lane, 1, Slice::kLanes);
  const float k_S = spread_sum(sk, lane, 1, Slice::kLanes);
  const float q_S = spread_sum(sq, lane, 1, Slice::kLanes);
  const Norms norm_of = to_norms(__shfl_sync(~0u, norm, 0), __shfl_sync(~0u, norm, 1),
                                 __shfl_sync(~0u, norm, 2), p.l2norm);

  // From here on a lane stands for the row of its vector number lane % kVectors.
  const int own = Slice::row(lane % Slice::kVectors);
  const float u = token.beta * (token.v[own] - norm_of.k * k_S);
  const float ku = norm_of.k * u;
  if (lane % Slice::kLanes < Slice::kVectors) {
    store_float(p.o.ptr, o_at + own, static_cast<DType>(p.dtype),
                p.scale * norm_of.q * (q_S + norm_of.qk * ku));
  }
#pragma unroll
  for (int i = 0; i < Slice::kVectors; ++i) {
    const float ku_of = __shfl_sync(~0u, ku, lane - lane % Slice::kLanes + i);
#pragma unroll
    for (int j = 0; j < Slice::kWidth; ++j) state.s[i][j] += k[j] * ku_of;
  }
}

// kOne: every sequence has one token, and no indices are per token.
template <DType kIn, int K, bool kVFirst, bool kOne>
__global__ void __launch_bounds__(kThreads, kOne ? kBlocksPerSMOne : kBlocksPerSM)
    recurrent_kda_kernel(const __grid_constant__ Params p) {
  using Slice = StateSlice<kIn, K, kVFirst>;
  constexpr int kBlock = kOne ? 1 : kBlockTokens;
  __shared__ Token<K> tokens[kOne ? 1 : 2][kBlock];
  __shared__ Scratch<K> scratch;

  const uint32_t n = blockIdx.z * gridDim.y + blockIdx.y;
  if (n >= p.N) return;
  const Item item = find_item<kOne>(p, n);
  const uint32_t first = item.hv * K * p.V + Slice::first_element(item.slice, p.V);
  TokenReader<K, kBlock> reader(p, p.heads_per_key.divide(item.hv), item.hv, item.slice, item.b,
                                item.begin);
  reader.fetch(item.length);
  // Behind the tokens' loads, as an index, where there is one, has to arrive first.
  const Rows rows = find_rows<kOne>(p, item);
  typename Slice::Loaded loaded;
  if (rows.valid && rows.source != kNoRow) {
    Slice::load(loaded, p.initial_state.ptr, rows.source * p.initial_state.stride_n + first, p.V,
                p.initial_aligned);
  } else {
    Slice::load_constant(loaded, !rows.valid);
  }

  reader.publish(tokens[0], item.length);
  __syncthreads();
  Slice state;
  state.take(loaded);
  int64_t o_at = element(p.o, item.b, item.begin, item.hv) + item.slice * kSliceV;
  auto store = [&](int64_t row) {
    state.store(p.final_state.ptr, row * p.final_state.stride_n + first, p.V,
                static_cast<DType>(p.final_dtype), p.final_aligned);
  };
  if constexpr (kOne) {
    step(state, tokens[0][0], p, o_at, scratch);
  } else {
    // Tokens after which the state is stored.
    const int64_t kept = keeps_every_state(p) && rows.valid ? p.indices_width : 0;
    int buffer = 0;
#pragma unroll 1
    for (int t = 0; t < item.length;) {
      const int left = item.length - t - kBlock;
      if (left > 0) reader.fetch(left);
#pragma unroll 1
      for (int i = 0; i < kBlock && t < item.length; ++i, ++t) {
        if (!kVFirst && i > 0) __syncthreads();
        step(state, tokens[buffer][i], p, o_at, scratch);
        o_at += p.o.stride_t;
        if (t < kept) {
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
  }
  if (rows.target != kNoRow) store(rows.target);
}

}  // namespace flashkda::cuda::sm80::decode
