// Sums over the lanes of a warp, in a fixed order.
#pragma once

namespace flashkda::cuda {

// Sums each of x[0..n) over the n lanes whose numbers differ in the bits stride, 2 stride, ..., n/2
// stride and returns, in the lane where these bits spell i, the sum of x[i]. Each step halves what
// a lane still has to sum, so that it takes n - 1 shuffles where n sums in every lane would take n
// log n.
template <int n>
__device__ __forceinline__ float transposed_sum(float (&x)[n], int lane, int stride) {
#pragma unroll
  for (int half = n / 2; half > 0; half /= 2) {
    const bool upper = lane & (half * stride);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? x[i + half] : x[i];
      const float give = upper ? x[i] : x[i + half];
      x[i] = keep + __shfl_xor_sync(~0u, give, half * stride);
    }
  }
  return x[0];
}

}  // namespace flashkda::cuda
