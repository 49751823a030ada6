// The inputs of a sequence's tokens: fetched a block of tokens ahead into registers, activated, and
// shared with the thread block.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/gate.cuh"
#include "../../common/ptx.cuh"
#include "../../common/warp.cuh"
#include "config.h"
#include "params.h"

namespace flashkda::cuda::sm80::decode {

// What every kernel begins with: it is launched while the one before it in its stream ends, and
// lets the one behind it do so. Memory is touched behind this alone, and read by plain loads, not
// as constant: it may have been written since the kernel's start.
__device__ __forceinline__ void start_beside() {
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
}

// Where a token's row begins, in elements.
__device__ __forceinline__ int64_t element(const Tokens& x, uint32_t b, int64_t t, uint32_t h) {
  return b * x.stride_b + t * x.stride_t + h * x.stride_h;
}

// One token as the recurrence consumes it, of v the columns of a slice. k and q are as given: their
// normalisation commutes with the products and is applied to sums (see Norms in sums.cuh).
template <int K, int kColumns>
struct alignas(16) Token {
  float growth[K];  // exp(g) - 1: near 0, where a slow decay lies, fp32 says it more exactly
  float k[K];
  float q[K];
  float v[kColumns];
  float4 norms[K / 32];  // k k, q q, q k, 0: each summed over 32 channels
  float beta;
};

// Thread d < K serves channel d of q, k and g; the last kColumns threads also the slice's columns
// of v, thread 0 also beta.
//
// kBlock: tokens fetched at once.
template <int K, int kColumns, int kBlock>
class TokenReader {
 public:
  // At token `begin` of batch row b, as value head hv, which uses head h of q and k, and a slice
  // of v see it.
  __device__ __forceinline__ TokenReader(const Params& p, uint32_t h, uint32_t hv, uint32_t slice,
                                         uint32_t b, int64_t begin)
      : p_(p), h_(h), hv_(hv), slice_(slice), b_(b), next_(begin) {
    if (p.A_log != nullptr) A_log_ = p.A_log[hv];
    if (p.dt_bias != nullptr) dt_bias_ = p.dt_bias[hv * K + channel()];
  }

  // Issues the loads of the next `count` tokens, at most kBlock.
  __device__ __forceinline__ void fetch(int count) {
    int64_t q = element(p_.q, b_, next_, h_) + channel();
    int64_t k = element(p_.k, b_, next_, h_) + channel();
    int64_t g = element(p_.g, b_, next_, hv_) + channel();
    const Tokens& other = reads_v() ? p_.v : p_.beta;
    int64_t extra = element(other, b_, next_, hv_);
    if (reads_v()) extra += slice_ * kColumns + threadIdx.x % kColumns;
    next_ += kBlock;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      if (i >= count) break;
      if (reads_channels()) {
        bits_[i].q = static_cast<const uint16_t*>(p_.q.ptr)[q];
        bits_[i].k = static_cast<const uint16_t*>(p_.k.ptr)[k];
        bits_[i].g = load_bits<false>(p_.g.ptr, g, static_cast<DType>(p_.g_dtype));
      }
      if (reads_v() || reads_beta()) {
        bits_[i].extra = load_bits<false>(other.ptr, extra, extra_dtype());
      }
      q += p_.q.stride_t;
      k += p_.k.stride_t;
      g += p_.g.stride_t;
      extra += other.stride_t;
    }
  }

  // Activates the tokens fetched last and writes them to shared memory. The caller synchronises.
  __device__ __forceinline__ void publish(Token<K, kColumns>* tokens, int count) {
    const GateParams gate{static_cast<Gate>(p_.gate), p_.lower_bound, expf(A_log_), dt_bias_};
    const DType dtype = static_cast<DType>(p_.dtype);
    // Not unrolled, as a step down a queue costs less than four copies of the code.
#pragma unroll 1
    for (int i = 0; i < min(count, kBlock); ++i) {
      Token<K, kColumns>& token = tokens[i];
      const Bits bits = bits_[0];
      if (reads_channels()) {
        const int d = threadIdx.x;
        const float q = bits_to_float(bits.q, dtype), k = bits_to_float(bits.k, dtype);
        const float g = bits_to_float(bits.g, static_cast<DType>(p_.g_dtype));
        token.q[d] = q;
        token.k[d] = k;
        token.growth[d] = expm1f(log_decay(g, gate));
        // Never fused with the first sum, so that all kernels have the same bits.
        float products[4] = {__fmul_rn(k, k), __fmul_rn(q, q), __fmul_rn(q, k), 0.f};
        const float sum = spread_sum(products, d % 32, 1, 32);
        if (d % 32 < 4) reinterpret_cast<float*>(&token.norms[d / 32])[d % 32] = sum;
      }
      const float extra = bits_to_float(bits.extra, extra_dtype());
      if (reads_v()) token.v[threadIdx.x % kColumns] = extra;
      if (reads_beta()) token.beta = beta_activation(extra, static_cast<BetaMode>(p_.beta_mode));
#pragma unroll
      for (int j = 1; j < kBlock; ++j) bits_[j - 1] = bits_[j];
    }
  }

 private:
  static __device__ __forceinline__ int channel() { return threadIdx.x % K; }
  static __device__ __forceinline__ bool reads_channels() { return threadIdx.x < K; }
  static __device__ __forceinline__ bool reads_v() { return threadIdx.x >= kThreads - kColumns; }
  static __device__ __forceinline__ bool reads_beta() { return threadIdx.x == 0; }

  struct Bits {
    uint32_t q, k, g, extra;  // extra is of v or of beta
  };

  __device__ __forceinline__ DType extra_dtype() const {
    return static_cast<DType>(reads_v() ? p_.dtype : p_.beta_dtype);
  }

  const Params& p_;
  float A_log_ = 0.f, dt_bias_ = 0.f;
  uint32_t h_, hv_, slice_, b_;
  int64_t next_;  // token to fetch
  Bits bits_[kBlock];
};

}  // namespace flashkda::cuda::sm80::decode
