// Sums over the lanes of a warp, in a fixed order.
#pragma once

namespace flashkda::cuda {

// Sums each of x[0..n) over the kLanes lanes whose numbers differ in the bits stride, 2 stride,
// ..., kLanes/2 stride. Where these bits spell i, x[0..n/kLanes) become the sums of x[i n/kLanes
// ..]. Each step halves what a lane still has to sum, so that it takes fewer than n shuffles where
// n sums in every lane would take n log kLanes.
template <int kLanes, int n>
__device__ __forceinline__ void transposed_sums(float (&x)[n], int lane, int stride) {
  static_assert(n % kLanes == 0);
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const int half = n / kLanes * lanes;
    const bool upper = lane & (lanes * stride);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = upper ? x[i + half] : x[i];
      const float give = upper ? x[i] : x[i + half];
      x[i] = keep + __shfl_xor_sync(~0u, give, lanes * stride);
    }
  }
}

// Sums x[i] over the lanes whose numbers differ in the bits from `stride` to `end`; the sum of x[i]
// is returned where the lowest of these bits spell i.
template <int n>
__device__ __forceinline__ float spread_sum(float (&x)[n], int lane, int stride, int end) {
  transposed_sums<n>(x, lane, stride);
#pragma unroll
  for (int mask = n * stride; mask < end; mask *= 2) x[0] += __shfl_xor_sync(~0u, x[0], mask);
  return x[0];
}

}  // namespace flashkda::cuda
