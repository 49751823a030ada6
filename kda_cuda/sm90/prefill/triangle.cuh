// The inverse of a part's 16 x 16 matrix.
#pragma once

#include "../../common/element.cuh"
#include "../../common/tile.cuh"

namespace flashkda::cuda::sm90::prefill {

inline constexpr int kTriangle = 16;

// By columns, each of which is read by all lanes at once.
inline constexpr int kTriangleStride = kTriangle + 4;

// T = diag(rk) (I + A)^-1 diag(beta) by one warp; A strictly lower, by columns. T's diagonal, rk
// beta, is kept apart. The diagonal blocks of 8 x 8 are solved side by side, a lane having half a
// row of one; the block below them is -T22 A21 T11.
template <class Elem>
__device__ __forceinline__ void invert_triangle(Elem* T, const float* A, const float* rk,
                                                const float* beta, int lane) {
  using Traits = ElementTraits<Elem>;
  constexpr uint32_t kAll = 0xffffffffu;
  const int row = lane % 16, r = row % 8, block = row / 8, side = lane / 16;
  const int first = side * 4;  // the lane's columns within a block
  float x[4], a[7];
#pragma unroll
  for (int c = 0; c < 4; ++c) x[c] = first + c == r ? 1.f : 0.f;
#pragma unroll
  for (int j = 0; j < 7; ++j) a[j] = A[(block * 8 + j) * kTriangleStride + row];
#pragma unroll
  for (int j = 0; j < 7; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] -= a[j] * __shfl_sync(kAll, x[c], (lane & 24) | j);
  }
  // Either block's lanes sum over four of the eight j.
  float y[4] = {}, z[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float a21 = A[(block * 4 + j) * kTriangleStride + 8 + r];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      y[c] += a21 * __shfl_sync(kAll, x[c], side * 16 + block * 4 + j);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) y[c] += __shfl_xor_sync(kAll, y[c], 8);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float t22 = __shfl_sync(kAll, x[j], block * 16 + 8 + r);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      z[c] -= t22 * __shfl_sync(kAll, y[c], side * 16 + block * 4 + j);
    }
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) z[c] += __shfl_xor_sync(kAll, z[c], 8);

  const float4 own = *reinterpret_cast<const float4*>(beta + block * 8 + first);
  const float4 left = *reinterpret_cast<const float4*>(beta + first);
  const float own_rk = rk[row], lower_rk = block == 0 ? rk[8 + r] : 0.f;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (first + c == r) x[c] = 0.f;
    x[c] *= own_rk;
    z[c] *= lower_rk;
  }
  const auto store = [&](int to_row, int to_block, const float (&t)[4], const float4& scale) {
    *reinterpret_cast<uint2*>(reinterpret_cast<char*>(T) + square_offset(to_row, to_block) +
                              first * 2) = make_uint2(Traits::pack(t[0] * scale.x, t[1] * scale.y),
                                                      Traits::pack(t[2] * scale.z, t[3] * scale.w));
  };
  store(row, block, x, own);
  store((row + 8) % 16, block, z, left);  // T21, and zeros in the block above the diagonal
}

}  // namespace flashkda::cuda::sm90::prefill
