// Which sequence, head and value columns a block walks.
#pragma once

#include <cstdint>

#include "params.h"

namespace flashkda::cuda {

struct Work {
  int64_t n;      // sequence
  int64_t row;    // batch row
  int64_t begin;  // its first token in that row
  int64_t tokens;
  int hv, h;
  int v0;  // first value column
  int chunks;
};

__device__ __forceinline__ int64_t cu_seqlen(const Problem& p, int64_t n) {
  const int64_t x = p.cu_seqlens_64 ? static_cast<const int64_t*>(p.cu_seqlens)[n]
                                    : static_cast<const int32_t*>(p.cu_seqlens)[n];
  return min(max(x, int64_t{0}), p.T);  // whatever the device holds, no access leaves the tensors
}

// The sequence that is rank-th by length, longest first, ties in order. All threads of the block
// take part.
__device__ __forceinline__ int64_t sequence_of_rank(const Problem& p, int64_t rank, int* shared) {
  for (int64_t n = threadIdx.x; n < p.N; n += blockDim.x) {
    const int64_t length = cu_seqlen(p, n + 1) - cu_seqlen(p, n);
    int64_t before = 0;
    for (int64_t m = 0; m < p.N; ++m) {
      const int64_t other = cu_seqlen(p, m + 1) - cu_seqlen(p, m);
      before += other > length || (other == length && m < n);
    }
    if (before == rank) *shared = static_cast<int>(n);
  }
  __syncthreads();
  return *shared;
}

// Ranking is quadratic in N; past this many sequences their own order balances well enough.
inline constexpr int64_t kMaxRanked = 128;

// `number` counts the heads of all sequences. kChunk: the tokens of a chunk.
template <int kChunk>
__device__ __forceinline__ Work find_work(const Problem& p, int64_t number, int v0, int* shared) {
  Work w;
  w.v0 = v0;
  w.hv = static_cast<int>(number % p.HV);
  w.h = w.hv / (p.HV / p.H);
  w.n = number / p.HV;
  if (p.cu_seqlens == nullptr) {
    w.row = w.n;
    w.begin = 0;
    w.tokens = p.T;
  } else {
    if (p.N > 1 && p.N <= kMaxRanked) w.n = sequence_of_rank(p, w.n, shared);
    w.row = 0;
    w.begin = cu_seqlen(p, w.n);
    w.tokens = max(cu_seqlen(p, w.n + 1) - w.begin, int64_t{0});
  }
  w.chunks = static_cast<int>((w.tokens + kChunk - 1) / kChunk);
  return w;
}

}  // namespace flashkda::cuda
