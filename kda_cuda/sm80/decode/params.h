// What the recurrent kernel is told: the launch's arguments packed tightly, as a kernel's first
// instructions wait for them to come from memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../common/params.h"

namespace flashkda::cuda::sm80::decode {

// x / divisor for x * divisor < 2^31, by a multiplication: with m = floor(2^31 / d) + 1 the product
// x m / 2^31 exceeds x / d by at most x / 2^31, less than the 1 / d that would be needed to reach
// the next integer.
class SmallDivider {
 public:
  explicit SmallDivider(uint32_t divisor) : multiplier_((uint32_t{1} << 31) / divisor + 1) {}

  __device__ __forceinline__ uint32_t divide(uint32_t x) const {
    return __umulhi(x << 1, multiplier_);
  }

 private:
  uint32_t multiplier_;
};

// Strides count elements.
struct Tokens {
  void* ptr;
  int64_t stride_b, stride_t, stride_h;
};

struct States {
  void* ptr;  // null where absent
  int64_t stride_n, size;
};

struct Params {
  uint32_t log2_slices, N;     // slices: V / kSliceV
  SmallDivider heads_per_key;  // HV / H
  const void* cu_seqlens;
  const void* state_indices;
  States initial_state, final_state;
  int64_t T;
  int V;
  Tokens q, k, g, v, beta, o;
  const float* A_log;
  const float* dt_bias;
  float scale, lower_bound;
  uint8_t gate, beta_mode, l2norm;
  uint8_t dtype, g_dtype, beta_dtype, final_dtype;  // dtype is that of q, k, v and o
  uint8_t initial_aligned, final_aligned;           // 16-byte vectors can be used
  uint8_t cu_seqlens_64, state_indices_64, accepted_64;
  uint8_t per_token, in_place;  // as in Pool
  int64_t indices_stride_n, indices_stride_t, indices_width;
  const void* num_accepted_tokens;
};

}  // namespace flashkda::cuda::sm80::decode
