// What a token does to a slice of the state, in the letters of docs/architecture.md. With
// S' = Diag(decay) S:
//
//   u = beta (v - S'^T k)    S = S' + k u^T    o = scale S^T q = scale (S'^T q + (q.k) u)
//
// so that all sums over K are taken at once. All kernels call these functions and so have the same
// bits: of [K, V] a run of rows is summed in order, the eight runs of a warp as a tree, the warps
// in order; of [V, K] a vector in order, the lanes of a row as a tree.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/warp.cuh"
#include "config.h"
#include "params.h"
#include "slice.cuh"
#include "tokens.cuh"

namespace flashkda::cuda::sm80::decode {

// What k and q are multiplied by, 1 without l2norm, and q.k before that.
struct Norms {
  float k, q;
  float qk;
};

template <class Token>
__device__ __forceinline__ Norms norms_of(const Token& token, bool l2norm) {
  float kk = 0.f, qq = 0.f, qk = 0.f;
#pragma unroll
  for (const float4& part : token.norms) {
    kk += part.x;
    qq += part.y;
    qk += part.z;
  }
  if (!l2norm) return {1.f, 1.f, qk};
  constexpr float kEps = 1e-6f;
  return {rsqrtf(kk + kEps), rsqrtf(qq + kEps), qk};
}

// One column of V: k u^T is the normalised k times u, or k as it is times ku.
struct Column {
  float ku, o;
};

__device__ __forceinline__ Column finish_column(const Params& p, const Norms& norms, float beta,
                                                float v, float k_S, float q_S) {
  const float u = beta * fmaf(-norms.k, k_S, v);
  const float ku = norms.k * u;
  return {ku, p.scale * norms.q * fmaf(norms.qk, ku, q_S)};
}

__device__ __forceinline__ float decayed(float s, float growth) { return fmaf(s, growth, s); }

// n adjacent floats of shared memory, aligned to all of them or to 16 bytes.
template <int n>
__device__ __forceinline__ void load_adjacent(float (&x)[n], const float* from) {
  using Vector = std::conditional_t<n % 4 == 0, float4, float2>;
  constexpr int kWidth = sizeof(Vector) / sizeof(float);
#pragma unroll
  for (int i = 0; i < n; i += kWidth) {
    *reinterpret_cast<Vector*>(x + i) = *reinterpret_cast<const Vector*>(from + i);
  }
}

// [K, V]: sums over the rows of a warp of columns that lanes share.
template <class Slice>
struct RowSums {
  // Columns of each sum that a lane has at the end, from column own() of the slice on.
  static constexpr int kOwn = Slice::kWidth / Slice::kGroups;

  float k[Slice::kRuns][Slice::kWidth] = {};
  float q[Slice::kRuns][Slice::kWidth] = {};

  // A row of the lane's run number `run`, decayed.
  __device__ __forceinline__ void add(int run, const float (&s)[Slice::kWidth], float k_row,
                                      float q_row) {
#pragma unroll
    for (int j = 0; j < Slice::kWidth; ++j) {
      k[run][j] = fmaf(s[j], k_row, k[run][j]);
      q[run][j] = fmaf(s[j], q_row, q[run][j]);
    }
  }

  // All rows of the lane. row(i, growth) gives row i of the state, decayed.
  template <class Token, class Row>
  __device__ __forceinline__ void add_all(const Token& token, const Row& row) {
#pragma unroll
    for (int run = 0; run < Slice::kRuns; ++run) {
      const int first = run * Slice::kRun, channel = Slice::row(first);
      float growth[Slice::kRun], k_rows[Slice::kRun], q_rows[Slice::kRun];
      load_adjacent(growth, token.growth + channel);
      load_adjacent(k_rows, token.k + channel);
      load_adjacent(q_rows, token.q + channel);
#pragma unroll
      for (int i = 0; i < Slice::kRun; ++i) {
        add(run, row(first + i, growth[i]), k_rows[i], q_rows[i]);
      }
    }
  }

  static __device__ __forceinline__ int own() { return Slice::column() + Slice::group() * kOwn; }

  // Leaves the sums in k[0] and q[0].
  __device__ __forceinline__ void sum_over_warp() {
    sum(k);
    sum(q);
  }

 private:
  // Runs 4 apart, then those 2 apart, then neighbours: a lane's own first, the others' by shuffles.
  static __device__ __forceinline__ void sum(float (&x)[Slice::kRuns][Slice::kWidth]) {
#pragma unroll
    for (int half = Slice::kRuns / 2; half > 0; half /= 2) {
#pragma unroll
      for (int run = 0; run < half; ++run) {
#pragma unroll
        for (int j = 0; j < Slice::kWidth; ++j) x[run][j] += x[run + half][j];
      }
    }
    transposed_sums<Slice::kGroups>(x[0], threadIdx.x % 32, Slice::kLanes);
  }
};

// [K, V]: a column's sum over the warps.
template <int kColumns>
__device__ __forceinline__ float sum_of_warps(const float (&parts)[kWarps][kColumns], int column) {
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w][column];
  return sum;
}

// [V, K]: a token's step on the rows of s, eight of a warp's, that begin with the lane's vector
// `first`. All of K is within the warp.
template <class Slice, int kCount, class Token>
__device__ __forceinline__ void step_on_rows(float (&s)[kCount][Slice::kWidth], int first,
                                             const Token& token, const Norms& norms,
                                             const Params& p, int64_t o_at) {
  static_assert(kCount * Slice::kGroups == 8, "the number of rows decides the order of the sums");
  constexpr int kWidth = Slice::kWidth;
  const int lane = threadIdx.x % 32, channel = Slice::column();
  float sk[kCount] = {}, sq[kCount] = {}, k[kWidth];
  load_adjacent(k, token.k + channel);
#pragma unroll
  for (int four = 0; four < kWidth; four += 4) {
    float growth[4], q[4];
    load_adjacent(growth, token.growth + channel + four);
    load_adjacent(q, token.q + channel + four);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = s[i][four + j];
        x = decayed(x, growth[j]);
        sk[i] = fmaf(x, k[four + j], sk[i]);
        sq[i] = fmaf(x, q[j], sq[i]);
      }
    }
  }
  const float k_S = spread_sum(sk, lane, 1, Slice::kLanes);
  const float q_S = spread_sum(sq, lane, 1, Slice::kLanes);

  // From here on a lane stands for the row of one of its vectors.
  const int own = Slice::row(first + lane % kCount);
  const Column column = finish_column(p, norms, token.beta, token.v[own], k_S, q_S);
  if (lane % Slice::kLanes < kCount) {
    store_float(p.o.ptr, o_at + own, static_cast<DType>(p.dtype), column.o);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float ku = __shfl_sync(~0u, column.ku, lane - lane % Slice::kLanes + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) s[i][j] = fmaf(k[j], ku, s[i][j]);
  }
}

}  // namespace flashkda::cuda::sm80::decode
