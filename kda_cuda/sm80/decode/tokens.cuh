// The inputs of a sequence's tokens: fetched a block of tokens ahead into registers, activated, and
// shared with the thread block. Whatever does not depend on the state happens here.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/gate.cuh"
#include "../../common/params.h"
#include "../../common/warp.cuh"
#include "config.h"

namespace flashkda::cuda::sm80::decode {

// One token as the recurrence consumes it. k and q are as given: their normalisation commutes with
// the products and is applied to sums (see Sums).
template <int K>
struct alignas(16) Token {
  float decay[K];  // exp(g)
  float k[K];
  float q[K];
  float v[kSliceV];
  float4 sums[K / 32];  // of 32 channels each: k k, q q, q k
  float beta;
};

// Scalars of a token.
struct Sums {
  float k_norm, q_norm;  // what k and q are multiplied by; 1 without l2norm
  float qk;
};

template <int K>
__device__ __forceinline__ Sums token_sums(const Token<K>& token, bool l2norm) {
  float kk = 0.f, qq = 0.f, qk = 0.f;
#pragma unroll
  for (int i = 0; i < K / 32; ++i) {
    const float4 sums = token.sums[i];
    kk += sums.x;
    qq += sums.y;
    qk += sums.z;
  }
  if (!l2norm) return {1.f, 1.f, qk};
  constexpr float kEps = 1e-6f;
  return {rsqrtf(kk + kEps), rsqrtf(qq + kEps), qk};
}

// Thread d < K serves channel d of q, k and g; the last warp also the slice's columns of v, thread
// 0 also beta.
template <int K>
class TokenReader {
 public:
  __device__ __forceinline__ explicit TokenReader(const Problem& p) : p_(p) {}

  // Moves to token `begin` of batch row b, as value head hv, which uses head h of q and k, and a
  // slice of v see it.
  __device__ __forceinline__ void seek(int h, int hv, int slice, int64_t b, int64_t begin) {
    const int channel = threadIdx.x % K, lane = threadIdx.x % 32;
    q_ = element(p_.q, b, begin, h) + channel;
    k_ = element(p_.k, b, begin, h) + channel;
    g_ = element(p_.g, b, begin, hv) + channel;
    if (reads_v()) {
      extra_ = element(p_.v, b, begin, hv) + slice * kSliceV + lane;
    } else {
      extra_ = element(p_.beta, b, begin, hv);
    }
    if (p_.A_log != nullptr) A_log_ = __ldg(p_.A_log + hv);
    if (p_.dt_bias != nullptr)
      dt_bias_ = __ldg(p_.dt_bias + static_cast<int64_t>(hv) * K + channel);
  }

  // Issues the loads of the next `count` tokens, at most kBlockTokens.
  __device__ __forceinline__ void fetch(int count) {
#pragma unroll
    for (int i = 0; i < kBlockTokens; ++i) {
      if (i >= count) break;
      if (reads_channels()) {
        bits_[i].q = __ldg(static_cast<const uint16_t*>(p_.q.ptr) + q_);
        bits_[i].k = __ldg(static_cast<const uint16_t*>(p_.k.ptr) + k_);
        bits_[i].g = load_bits(p_.g.ptr, g_, p_.g.dtype);
      }
      if (reads_v() || reads_beta()) {
        bits_[i].extra = load_bits(reads_v() ? p_.v.ptr : p_.beta.ptr, extra_, extra_dtype());
      }
      q_ += p_.q.stride_t;
      k_ += p_.k.stride_t;
      g_ += p_.g.stride_t;
      extra_ += reads_v() ? p_.v.stride_t : p_.beta.stride_t;
    }
  }

  // Activates the tokens fetched last and writes them to shared memory. The caller synchronises.
  __device__ __forceinline__ void publish(Token<K>* tokens, int count) {
    const GateParams gate{p_.gate, p_.lower_bound, expf(A_log_), dt_bias_};
    // Not unrolled, as a step down a queue costs less than four copies of the code: most calls
    // publish one token.
#pragma unroll 1
    for (int i = 0; i < min(count, kBlockTokens); ++i) {
      Token<K>& token = tokens[i];
      const Bits bits = bits_[0];
      if (reads_channels()) {
        const int d = threadIdx.x;
        const float q = bits_to_float(bits.q, p_.q.dtype);
        const float k = bits_to_float(bits.k, p_.k.dtype);
        token.decay[d] = expf(log_decay(bits_to_float(bits.g, p_.g.dtype), gate));
        token.k[d] = k;
        token.q[d] = q;
        const float kk = warp_sum(k * k), qq = warp_sum(q * q), qk = warp_sum(q * k);
        if (d % 32 == 0) token.sums[d / 32] = make_float4(kk, qq, qk, 0.f);
      }
      const float extra = bits_to_float(bits.extra, extra_dtype());
      if (reads_v()) token.v[threadIdx.x % 32] = extra;
      if (reads_beta()) token.beta = beta_activation(extra, p_.beta_mode);
#pragma unroll
      for (int j = 1; j < kBlockTokens; ++j) bits_[j - 1] = bits_[j];
    }
  }

 private:
  static __device__ __forceinline__ bool reads_channels() { return threadIdx.x < K; }
  static __device__ __forceinline__ bool reads_v() { return threadIdx.x >= kThreads - kSliceV; }
  static __device__ __forceinline__ bool reads_beta() { return threadIdx.x == 0; }

  struct Bits {
    uint32_t q, k, g, extra;
  };

  static __device__ __forceinline__ int64_t element(const TokenTensor& x, int64_t b, int64_t t,
                                                    int h) {
    return b * x.stride_b + t * x.stride_t + h * x.stride_h;
  }
  __device__ __forceinline__ DType extra_dtype() const {
    return reads_v() ? p_.v.dtype : p_.beta.dtype;
  }

  const Problem& p_;
  float A_log_ = 0.f, dt_bias_ = 0.f;
  int64_t q_, k_, g_, extra_;  // elements of the next token to fetch; extra is of v or of beta
  Bits bits_[kBlockTokens];
};

}  // namespace flashkda::cuda::sm80::decode
