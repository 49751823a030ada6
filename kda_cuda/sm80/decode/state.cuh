// The slice of the state that a block holds in registers, as fp32.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/params.h"
#include "../../common/ptx.cuh"
#include "config.h"
#include "rows.cuh"
#include "slice.cuh"

namespace flashkda::cuda::sm80::decode {

template <DType kIn, int K, bool kVFirst>
struct StateSlice : SliceMap<kIn, K, kVFirst, kSliceV> {
  using Map = SliceMap<kIn, K, kVFirst, kSliceV>;
  using Map::kVectors;
  using Map::kWidth;

  float s[kVectors][kWidth];

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
        loaded[i] = ptx::load_streaming_16(from + Map::offset(i, V));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      uint32_t words[4] = {};
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const uint32_t bits = from[Map::offset(i, V) + j];
        words[j * 4 / kWidth] |= bits << (kIn == DType::kF32 ? 0 : j % 2 * 16);
      }
      loaded[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // The same of the row that a sequence starts from, from element `first` of it on; without one
  // zero, or NaN where the rows are not valid.
  static __device__ __forceinline__ void load_source(Loaded& loaded, Rows rows, States states,
                                                     uint32_t first, int V, bool aligned) {
    if (rows.valid && rows.source != kNoRow) {
      load(loaded, states.ptr, rows.source * states.stride_n + first, V, aligned);
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) loaded[i] = constant_vector(!rows.valid);
    }
  }

  __device__ __forceinline__ void take(const Loaded& loaded) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) unpack(s[i], loaded[i]);
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
            __stcs(reinterpret_cast<uint4*>(to), pack(reinterpret_cast<const float (&)[8]>(*x)));
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
      for (int j = 0; j < kWidth; j += kCount) put(to + Map::offset(i, V) + j, &s[i][j]);
    }
  }
};

}  // namespace flashkda::cuda::sm80::decode
