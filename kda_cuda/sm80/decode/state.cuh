// A block's slice of a head's state: all K rows of kSliceV columns, in registers from load to
// store.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/params.h"
#include "config.h"

namespace flashkda::cuda::sm80::decode {

// A thread holds kVectors vectors of kWidth elements adjacent in memory, 16 bytes each in the dtype
// that is loaded. In both layouts the vectors that a warp loads at once lie in whole rows of the
// slice, kLanes lanes a row:
//
//   [K, V]: warp w holds rows (channels) w K/4 .. (w+1) K/4, a lane kVectors adjacent rows of the
//   same kWidth
//           columns of V.
//   [V, K]: warp w holds rows (columns of V) 8w .. 8w+8, a lane the same kWidth channels of
//   kVectors rows.
template <DType kIn, int K, bool kVFirst>
struct StateSlice {
  static constexpr int kWidth = kIn == DType::kF32 ? 4 : 8;
  static constexpr int kVectors = K * kSliceV / (kThreads * kWidth);
  static constexpr int kLanes = (kVFirst ? K : kSliceV) / kWidth;
  static constexpr int kGroups = 32 / kLanes;
  static_assert(kLanes <= 32, "a row must fit a warp");
  static_assert(kGroups * kVectors * kWarps == (kVFirst ? kSliceV : K),
                "the warps must cover the slice");

  // Row of the slice and column of that row where a lane's vector i begins.
  static __device__ __forceinline__ int row(int warp, int lane, int i) {
    const int group = lane / kLanes;
    const int within_warp = kVFirst ? i * kGroups + group : group * kVectors + i;
    return warp * kGroups * kVectors + within_warp;
  }
  static __device__ __forceinline__ int column(int lane) { return lane % kLanes * kWidth; }

  float s[kVectors][kWidth];

  __device__ __forceinline__ StateSlice(int warp, int lane, int slice, int V)
      : first_(kVFirst ? (slice * kSliceV + row(warp, lane, 0)) * K + column(lane)
                       : row(warp, lane, 0) * V + slice * kSliceV + column(lane)),
        stride_(kVFirst ? kGroups * K : V) {}

  __device__ __forceinline__ void fill(float x) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) s[i][j] = x;
    }
  }

  // Issues the loads of the head's matrix that begins at element `offset`; unpack() waits for them.
  __device__ __forceinline__ void load(const void* ptr, int64_t offset, bool aligned) {
    using Element = std::conditional_t<kIn == DType::kF32, uint32_t, uint16_t>;
    const Element* from = static_cast<const Element*>(ptr) + offset + first_;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (aligned) {
        bits_[i] = __ldcs(reinterpret_cast<const uint4*>(from + i * stride_));
      } else {
        uint32_t words[4] = {};
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          words[j * 4 / kWidth] |= uint32_t{from[i * stride_ + j]}
                                   << (kIn == DType::kF32 ? 0 : j % 2 * 16);
        }
        bits_[i] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  __device__ __forceinline__ void unpack() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[4] = {bits_[i].x, bits_[i].y, bits_[i].z, bits_[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        if constexpr (kIn == DType::kF32) {
          s[i][w] = __uint_as_float(words[w]);
        } else {
          s[i][2 * w] = __uint_as_float(words[w] << 16);
          s[i][2 * w + 1] = __uint_as_float(words[w] & 0xffff0000u);
        }
      }
    }
  }

  __device__ __forceinline__ void store(void* ptr, int64_t offset, DType dtype,
                                        bool aligned) const {
    const int64_t first = offset + first_;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = first + i * stride_;
      if (!aligned) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) store_float(ptr, at + j, dtype, s[i][j]);
      } else if (dtype == DType::kF32) {
#pragma unroll
        for (int j = 0; j < kWidth; j += 4) {
          __stcs(reinterpret_cast<float4*>(static_cast<float*>(ptr) + at + j),
                 make_float4(s[i][j], s[i][j + 1], s[i][j + 2], s[i][j + 3]));
        }
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; j += 4) {
          __stcs(reinterpret_cast<uint2*>(static_cast<uint16_t*>(ptr) + at + j),
                 make_uint2(pack_bf16(s[i][j], s[i][j + 1]), pack_bf16(s[i][j + 2], s[i][j + 3])));
        }
      }
    }
  }

 private:
  int first_;   // element of the matrix where the thread's vectors begin
  int stride_;  // elements from one vector to the next
  uint4 bits_[kVectors];
};

}  // namespace flashkda::cuda::sm80::decode
