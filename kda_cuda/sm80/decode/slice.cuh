// A slice of a head's state: all K rows of some columns of V, and how a block's threads share it.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/params.h"
#include "config.h"

namespace flashkda::cuda::sm80::decode {

// A thread has kVectors vectors of kWidth elements adjacent in memory, 16 bytes each in the dtype
// of the states that are loaded, kLanes lanes to a row of the slice:
//
//   [K, V]: warp w has rows (channels) w K/4 .. (w+1) K/4 as eight runs of kRun rows. Its kGroups
//           groups of lanes have a run each, then the next kGroups runs, until all are held.
//   [V, K]: warp w has a quarter of the rows (columns of V); its groups have a row each, then the
//           next.
template <DType kIn, int K, bool kVFirst, int kColumns>
struct SliceMap {
  static constexpr int kWidth = kIn == DType::kF32 ? 4 : 8;
  static constexpr int kVectors = K * kColumns / (kThreads * kWidth);
  static constexpr int kLanes = (kVFirst ? K : kColumns) / kWidth;
  static constexpr int kGroups = 32 / kLanes;
  static constexpr int kRows = (kVFirst ? kColumns : K) / kWarps;  // of a warp
  static constexpr int kRun = kVFirst ? 1 : kRows / 8;
  static constexpr int kRuns = kVectors / kRun;  // of a lane
  static_assert(kLanes <= 32, "a row must fit a warp");
  static_assert(kGroups * kVectors == kRows && kRun * kRuns == kVectors,
                "the warps must cover the slice");

  static __device__ __forceinline__ int group() { return threadIdx.x % 32 / kLanes; }

  // Rows from a thread's first vector to its vector i.
  static constexpr __host__ __device__ int step(int i) {
    return i / kRun * kGroups * kRun + i % kRun;
  }
  // Row of the slice and column of that row where a thread's vector i begins.
  static __device__ __forceinline__ int row(int i) {
    return static_cast<int>(threadIdx.x) / 32 * kRows + group() * kRun + step(i);
  }
  static __device__ __forceinline__ int column() { return threadIdx.x % kLanes * kWidth; }

  // Element of the head's matrix where a thread's first vector begins, and elements from there to
  // its vector i.
  static __device__ __forceinline__ int first_element(int slice, int V) {
    return kVFirst ? (slice * kColumns + row(0)) * K + column()
                   : row(0) * V + slice * kColumns + column();
  }
  static __device__ __forceinline__ int offset(int i, int V) { return step(i) * (kVFirst ? K : V); }
};

// The elements of a vector of bf16 or fp32.
template <int kWidth>
__device__ __forceinline__ void unpack(float (&s)[kWidth], const uint4& x) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kWidth == 4) {
      s[w] = __uint_as_float(words[w]);
    } else {
      s[2 * w] = __uint_as_float(words[w] << 16);
      s[2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
    }
  }
}

template <int kWidth>
__device__ __forceinline__ uint4 pack(const float (&s)[kWidth]) {
  if constexpr (kWidth == 4) {
    return make_uint4(__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]),
                      __float_as_uint(s[3]));
  } else {
    return make_uint4(pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]),
                      pack_bf16(s[6], s[7]));
  }
}

// Vectors that stand for a state of zeros, or of NaN: the same bits in fp32 and in bf16.
__device__ __forceinline__ uint4 constant_vector(bool nan) {
  const uint32_t x = nan ? 0x7fc07fc0u : 0u;
  return make_uint4(x, x, x, x);
}

}  // namespace flashkda::cuda::sm80::decode
