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
  __device__ __forceinline__ TokenReader(const Problem& p, int hv, int slice)
      : p_(p), gate_(load_gate_params(p, hv, threadIdx.x % K)) {
    const int h = hv / (p.HV / p.H), channel = threadIdx.x % K, lane = threadIdx.x % 32;
    q_ = h * p.q.stride_h + channel;
    k_ = h * p.k.stride_h + channel;
    g_ = hv * p.g.stride_h + channel;
    extra_ = reads_v() ? hv * p.v.stride_h + slice * kSliceV + lane : hv * p.beta.stride_h;
    extra_stride_ = reads_v() ? p.v.stride_t : p.beta.stride_t;
    extra_dtype_ = reads_v() ? p.v.dtype : p.beta.dtype;
  }

  // Moves from the head's first element of the tensors to that of token `begin` of batch row b.
  __device__ __forceinline__ void seek(int64_t b, int64_t begin) {
    q_ += b * p_.q.stride_b + begin * p_.q.stride_t;
    k_ += b * p_.k.stride_b + begin * p_.k.stride_t;
    g_ += b * p_.g.stride_b + begin * p_.g.stride_t;
    extra_ += b * (reads_v() ? p_.v.stride_b : p_.beta.stride_b) + begin * extra_stride_;
  }

  // Issues the loads of the next `count` tokens, at most kBlockTokens.
  __device__ __forceinline__ void fetch(int count) {
#pragma unroll
    for (int i = 0; i < kBlockTokens; ++i) {
      if (i >= count) break;
      if (reads_channels()) {
        bits_[i].q = load_bits(p_.q.ptr, q_, p_.q.dtype);
        bits_[i].k = load_bits(p_.k.ptr, k_, p_.k.dtype);
        bits_[i].g = load_bits(p_.g.ptr, g_, p_.g.dtype);
      }
      if (reads_v() || reads_beta()) {
        bits_[i].extra = load_bits(reads_v() ? p_.v.ptr : p_.beta.ptr, extra_, extra_dtype_);
      }
      q_ += p_.q.stride_t;
      k_ += p_.k.stride_t;
      g_ += p_.g.stride_t;
      extra_ += extra_stride_;
    }
  }

  // Activates the tokens fetched last and writes them to shared memory. The caller synchronises.
  __device__ __forceinline__ void publish(Token<K>* tokens, int count) const {
#pragma unroll
    for (int i = 0; i < kBlockTokens; ++i) {
      if (i >= count) break;
      Token<K>& token = tokens[i];
      if (reads_channels()) {
        const int d = threadIdx.x;
        const float q = bits_to_float(bits_[i].q, p_.q.dtype);
        const float k = bits_to_float(bits_[i].k, p_.k.dtype);
        token.decay[d] = expf(log_decay(bits_to_float(bits_[i].g, p_.g.dtype), gate_));
        token.k[d] = k;
        token.q[d] = q;
        const float kk = warp_sum(k * k), qq = warp_sum(q * q), qk = warp_sum(q * k);
        if (d % 32 == 0) token.sums[d / 32] = make_float4(kk, qq, qk, 0.f);
      }
      const float extra = bits_to_float(bits_[i].extra, extra_dtype_);
      if (reads_v()) token.v[threadIdx.x % 32] = extra;
      if (reads_beta()) token.beta = beta_activation(extra, p_.beta_mode);
    }
  }

 private:
  static __device__ __forceinline__ bool reads_channels() { return threadIdx.x < K; }
  static __device__ __forceinline__ bool reads_v() { return threadIdx.x >= kThreads - kSliceV; }
  static __device__ __forceinline__ bool reads_beta() { return threadIdx.x == 0; }

  struct Bits {
    uint32_t q, k, g, extra;
  };

  const Problem& p_;
  GateParams gate_;
  int64_t q_, k_, g_, extra_;  // elements of the next token to fetch; extra is of v or of beta
  int64_t extra_stride_;
  DType extra_dtype_;
  Bits bits_[kBlockTokens];
};

}  // namespace flashkda::cuda::sm80::decode
