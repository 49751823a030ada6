// A slice of a head's state: all K rows of kSliceV columns of V, shared by the threads of a block.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/params.h"
#include "../../common/ptx.cuh"
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

  float s[kVectors][kWidth];

  // Row of the slice and column of that row where a thread's vector i begins.
  static __device__ __forceinline__ int row(int i) {
    const int warp = threadIdx.x / 32, group = threadIdx.x % 32 / kLanes;
    return (warp * kGroups + (kVFirst ? 0 : group)) * kVectors +
           (kVFirst ? i * kGroups + group : i);
  }
  static __device__ __forceinline__ int column() { return threadIdx.x % kLanes * kWidth; }

  // Element of the head's matrix where a thread's vectors begin, and elements from one vector to
  // the next.
  static __device__ __forceinline__ int first_element(int slice, int V) {
    return kVFirst ? (slice * kSliceV + row(0)) * K + column()
                   : row(0) * V + slice * kSliceV + column();
  }
  static __device__ __forceinline__ int vector_stride(int V) { return kVFirst ? kGroups * K : V; }

  // What load() left, not waited for before take().
  using Loaded = uint4[kVectors];

  // Issues the loads of vectors that begin at element `at` of `ptr`.
  static __device__ __forceinline__ void load(Loaded& loaded, const void* ptr, int64_t at, int V,
                                              bool aligned) {
    using Element = std::conditional_t<kIn == DType::kF32, uint32_t, uint16_t>;
    const Element* from = static_cast<const Element*>(ptr) + at;
    if (aligned) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        loaded[i] = ptx::load_streaming_16(from + i * vector_stride(V));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      uint32_t words[4] = {};
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        words[j * 4 / kWidth] |= uint32_t{from[j]} << (kIn == DType::kF32 ? 0 : j % 2 * 16);
      }
      loaded[i] = make_uint4(words[0], words[1], words[2], words[3]);
      from += vector_stride(V);
    }
  }

  // Instead of load(): zero, or NaN.
  static __device__ __forceinline__ void load_constant(Loaded& loaded, bool nan) {
    const uint32_t x = nan ? 0x7fc07fc0u : 0u;  // the same in fp32 and in bf16
#pragma unroll
    for (int i = 0; i < kVectors; ++i) loaded[i] = make_uint4(x, x, x, x);
  }

  __device__ __forceinline__ void take(const Loaded& loaded) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t words[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
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

  // As load().
  __device__ __forceinline__ void store(void* ptr, int64_t at, int V, DType dtype,
                                        bool aligned) const {
    if (dtype == DType::kF32) {
      float* to = static_cast<float*>(ptr) + at;
      if (aligned) {
        store_vectors<4>(to, V, [](float* to, const float* x) {
          __stcs(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
        });
      } else {
        store_vectors<1>(to, V, [](float* to, const float* x) { *to = *x; });
      }
    } else {
      __nv_bfloat16* to = static_cast<__nv_bfloat16*>(ptr) + at;
      if (aligned) {
        store_vectors<kWidth>(to, V, [](__nv_bfloat16* to, const float* x) {
          if constexpr (kWidth == 8) {
            __stcs(reinterpret_cast<uint4*>(to),
                   make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                              pack_bf16(x[6], x[7])));
          } else {
            __stcs(reinterpret_cast<uint2*>(to),
                   make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])));
          }
        });
      } else {
        store_vectors<1>(to, V,
                         [](__nv_bfloat16* to, const float* x) { *to = __float2bfloat16_rn(*x); });
      }
    }
  }

 private:
  // put() stores kCount elements.
  template <int kCount, class Element, class Put>
  __device__ __forceinline__ void store_vectors(Element* to, int V, Put put) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; j += kCount) put(to + j, &s[i][j]);
      to += vector_stride(V);
    }
  }
};

}  // namespace flashkda::cuda::sm80::decode
