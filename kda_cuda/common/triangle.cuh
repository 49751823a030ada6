// The 16 x 16 matrices of a chunk: what is common to the kernels that make them.
#pragma once

#include "element.cuh"
#include "tile.cuh"

namespace flashkda::cuda {

inline constexpr int kTriangle = 16;

// A's columns are read as float4 by all lanes at once and written by eight rows of lanes.
inline constexpr int kTriangleStride = kTriangle + 4;

// T = diag(rk) (I + A)^-1 diag(beta) by one warp, a lane a column, each column twice; A strictly
// lower, by columns. T's diagonal is stored apart, in fp32.
template <class Elem>
__device__ __forceinline__ void invert_triangle(Elem* T, float* T_diagonal, const float* A,
                                                const float* rk, float beta, int lane) {
  const int column = lane % kTriangle;
  float x[kTriangle];
#pragma unroll
  for (int i = 0; i < kTriangle; ++i) x[i] = i == column ? 1.f : 0.f;
  // Once x[j] is known, it is taken from all later rows at once: their updates do not wait for each
  // other.
#pragma unroll
  for (int j = 0; j < kTriangle - 1; ++j) {
#pragma unroll
    for (int i = (j + 1) / 4 * 4; i < kTriangle; i += 4) {
      const float4 a = *reinterpret_cast<const float4*>(A + j * kTriangleStride + i);
      if (i > j) x[i] -= a.x * x[j];
      if (i + 1 > j) x[i + 1] -= a.y * x[j];
      if (i + 2 > j) x[i + 2] -= a.z * x[j];
      x[i + 3] -= a.w * x[j];
    }
  }
  if (lane < kTriangle) T_diagonal[column] = rk[column] * beta;
  const bool upper = lane >= kTriangle;  // lanes 0-15 store rows 0-7, lanes 16-31 rows 8-15
#pragma unroll
  for (int i = 0; i < kTriangle / 2; ++i) {
    const int row = upper ? i + 8 : i;
    const float low = x[i], high = x[i + 8];
    const float t = row == column ? 0.f : rk[row] * (upper ? high : low) * beta;
    *reinterpret_cast<Elem*>(reinterpret_cast<char*>(T) + square_offset(row, column / 8) +
                             (column % 8) * 2) = ElementTraits<Elem>::from_float(t);
  }
}

}  // namespace flashkda::cuda
