// Division by a number that the host knows: a multiplication on the device, where a division takes
// some hundred cycles before a kernel's first load.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace flashkda::cuda {

// x / divisor for 0 <= x < 2^31. With m = floor(2^63 / d) + 1 the product x m / 2^63 exceeds x / d
// by at most x / 2^63, less than the 1 / d that would be needed to reach the next integer.
class Divider {
 public:
  explicit Divider(int divisor) : multiplier_((uint64_t{1} << 63) / divisor + 1) {}

  __device__ __forceinline__ int divide(int x) const {
    return static_cast<int>(__umul64hi(static_cast<uint64_t>(x) << 1, multiplier_));
  }

 private:
  uint64_t multiplier_;
};

}  // namespace flashkda::cuda
