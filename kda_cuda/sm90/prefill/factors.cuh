// The factor warps: a warpgroup of them turns a chunk's k, q and g into the factors that multiply
// the state. With e_t = exp(g_t),
//
//   k_bar_t   = k_t e_1 .. e_t          q_bar_t = q_t e_1 .. e_t        decay = e_1 .. e_C
//   k_tilde_t = k_t e_{t+1} .. e_C      k_hat_t = k_tilde_t / decay
//
// are products of numbers <= 1, but for k_hat, which is only read where it stays in bf16's range. A
// warp owns 32 channels and a lane four of them, over four neighbouring tokens (a span), so that
// the running products need two exchanges between lanes. The code is kept small on purpose: what
// does not fit the instruction cache is paid for by all roles.
#pragma once

#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../ptx.cuh"
#include "shared.cuh"
#include "tile.cuh"

namespace flashkda::cuda::sm90::prefill {

using Bf16 = ElementTraits<__nv_bfloat16>;

template <class Cfg>
class FactorWarp {
  static constexpr int kSpan = 4;  // tokens of a lane
  static constexpr int kOwn = 4;   // channels of a lane

 public:
  __device__ FactorWarp(const Problem& p, const Work& w, Shared<Cfg>& s, uint32_t base, int warp,
                        int lane)
      : p_(p),
        s_(s),
        base_(base),
        rank_(w.v0 / Cfg::VS),
        group_(warp / 4),
        warp_(warp % 4),
        lane_(lane),
        tokens_(static_cast<int>(w.tokens)),
        chunks_(w.chunks),
        first_(rank_ + group_ * Cfg::kCluster) {
    params_ = load_decay_params(p, w.hv);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      shift_[c] = load_shift(p, params_, w.hv, warp_ * 32 + lane % 8 * kOwn + c);
    }
  }

  __device__ void run() {
    Cursor<kRaw> raw(group_);
    Cursor<Cfg::kOwn> own(group_);
#pragma unroll 1
    for (int c = first_; c < chunks_; c += Cfg::kFactorGroups * Cfg::kCluster) {
      // Addresses are cheaper to find again for every chunk than to keep.
      lane_ = ptx::opaque_lane(lane_);
      make(tokens_ - c * kChunk, raw, own);
      raw.advance(Cfg::kFactorGroups);
      own.advance(Cfg::kFactorGroups);
    }
  }

 private:
  __device__ __forceinline__ uint32_t at(const void* part) const {
    return address_of(s_, base_, part);
  }

  // Four 16-bit elements from one place of a tile.
  template <class G>
  static __device__ __forceinline__ void unpack(float (&x)[kOwn], uint2 bits) {
    const float2 low = ElementTraits<G>::unpack(bits.x), high = ElementTraits<G>::unpack(bits.y);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = high.x;
    x[3] = high.y;
  }

  // Stores and returns x times factor.
  static __device__ __forceinline__ uint2 store(char* place, const float (&x)[kOwn],
                                                const float (&factor)[kOwn]) {
    const uint2 y = make_uint2(Bf16::pack(x[0] * factor[0], x[1] * factor[1]),
                               Bf16::pack(x[2] * factor[2], x[3] * factor[3]));
    *reinterpret_cast<uint2*>(place) = y;
    return y;
  }

  static __device__ __forceinline__ __nv_bfloat162 larger(__nv_bfloat162 x, uint32_t y) {
    return __hmax2(x, __habs2(reinterpret_cast<__nv_bfloat162&>(y)));
  }

  template <Gate kGate>
  __device__ __forceinline__ void activate(float (&e)[kSpan][kOwn]) const {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) e[i][c] = decay_of<kGate>(e[i][c], params_, shift_[c]);
    }
  }

  // The gate's input of the lane's tokens. place: of the lane's channels in row i of a half.
  template <class Place>
  __device__ __forceinline__ void load_gate(float (&x)[kSpan][kOwn], const char* g,
                                            const Place& place) const {
    if (p_.g.dtype == DType::kF32) {
      const float4* row = reinterpret_cast<const float4*>(g) +
                          (lane_ / 8 * kSpan * kChannels + warp_ * 32 + lane_ % 8 * kOwn) / kOwn;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const float4 y = row[i * kChannels / kOwn];
        x[i][0] = y.x;
        x[i][1] = y.y;
        x[i][2] = y.z;
        x[i][3] = y.w;
      }
    } else {
      const char* half = g + warp_ / 2 * sizeof(Raw::k[0]);
      uint2 bits[kSpan];
#pragma unroll
      for (int i = 0; i < kSpan; ++i) bits[i] = *reinterpret_cast<const uint2*>(half + place(i));
      if (p_.g.dtype == DType::kBF16) {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) unpack<__nv_bfloat16>(x[i], bits[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) unpack<__half>(x[i], bits[i]);
      }
    }
  }

  // From the gate's input to exp(g).
  __device__ __forceinline__ void activate_all(float (&e)[kSpan][kOwn]) const {
    switch (p_.gate) {
      case Gate::kBounded:
        activate<Gate::kBounded>(e);
        break;
      case Gate::kSoftplus:
        activate<Gate::kSoftplus>(e);
        break;
      default:
        activate<Gate::kGiven>(e);
    }
  }

  __device__ __forceinline__ void make(int left, const Cursor<kRaw>& raw_at,
                                       const Cursor<Cfg::kOwn>& own) const {
    const Raw& raw = s_.raw[raw_at.at];
    Slot& to = s_.slots[own.at * Cfg::kCluster + rank_];
    const int span = lane_ / 8, half = warp_ / 2;
    // Four rows on, the swizzle differs in its third bit: neighbouring spans meet in no bank.
    const int piece = (warp_ % 2 * 4 + lane_ % 8 / 2) ^ (span % 2 * 4);
    const int corner = span * kSpan * kRowBytes + lane_ % 2 * 8;
    const auto place = [&](int i) { return corner + i * kRowBytes + (piece ^ i) * kPiece; };

    ptx::mbarrier_wait_at(at(&s_.raw_full[raw_at.at]), raw_at.parity);
    const char* k_half = reinterpret_cast<const char*>(raw.k[half]);
    const char* q_half = reinterpret_cast<const char*>(raw.q[half]);
    uint2 k[kSpan], q[kSpan];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      k[i] = *reinterpret_cast<const uint2*>(k_half + place(i));
      q[i] = *reinterpret_cast<const uint2*>(q_half + place(i));
    }
    float e[kSpan][kOwn];
    load_gate(e, raw.g, place);
    ptx::mbarrier_arrive_at(at(&s_.raw_empty[raw_at.at]));
    activate_all(e);
    if (left < kChunk) {
#pragma unroll 1
      for (int t = left; t < kChunk; ++t) {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
          if (span * kSpan + i != t) continue;
          k[i] = q[i] = make_uint2(0, 0);
#pragma unroll
          for (int c = 0; c < kOwn; ++c) e[i][c] = 1.f;
        }
      }
    }

    // Products of the decays before the lane's span, after it, and of the whole chunk.
    float before[kOwn], after[kOwn], decay[kOwn];
    bool steep = false;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const float own = (e[0][c] * e[1][c]) * (e[2][c] * e[3][c]);
      const float neighbour = __shfl_xor_sync(~0u, own, 8);
      const float pair = own * neighbour;
      const float others = __shfl_xor_sync(~0u, pair, 16);
      before[c] = (span & 1 ? neighbour : 1.f) * (span & 2 ? others : 1.f);
      after[c] = (span & 1 ? 1.f : neighbour) * (span & 2 ? 1.f : others);
      decay[c] = pair * others;
      steep |= decay[c] < kSmallestBf16Decay;
    }
    ptx::mbarrier_wait_at(at(&s_.empty[own.at]), own.parity ^ 1);
    if (lane_ < 8) {
      float* place = to.decay + decay_place(warp_ * 32 + lane_ * kOwn);
      constexpr int kNext = decay_place(2) - decay_place(0);
      *reinterpret_cast<float2*>(place) = make_float2(decay[0], decay[1]);
      *reinterpret_cast<float2*>(place + kNext) = make_float2(decay[2], decay[3]);
    }
    char* k_tilde = reinterpret_cast<char*>(to.k_tilde[half]);
    char* k_hat = reinterpret_cast<char*>(s_.hats[own.at].k_hat[half]);
    __nv_bfloat162 largest = __float2bfloat162_rn(0.f);
    float inverse[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) inverse[c] = ptx::rcp(decay[c]);
#pragma unroll
    for (int i = kSpan - 1; i >= 0; --i) {
      float x[kOwn];
      unpack<__nv_bfloat16>(x, k[i]);
      store(k_tilde + place(i), x, after);
#pragma unroll
      for (int c = 0; c < kOwn; ++c) x[c] *= after[c];
      const uint2 hat = store(k_hat + place(i), x, inverse);
      largest = larger(larger(largest, hat.x), hat.y);
#pragma unroll
      for (int c = 0; c < kOwn; ++c) after[c] *= e[i][c];
    }
    // A k of great norm may leave the range with less decay.
    steep |= isinf(__low2float(largest)) || isinf(__high2float(largest));
    steep = __any_sync(~0u, steep);
    if (lane_ == 0) s_.steep[own.at][warp_] = steep;
    char* bars = reinterpret_cast<char*>(to.bars[half]);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      float x[kOwn];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) before[c] *= e[i][c];
      unpack<__nv_bfloat16>(x, k[i]);
      store(bars + place(i), x, before);
      unpack<__nv_bfloat16>(x, q[i]);
      store(bars + place(i) + kChunk * kRowBytes, x, before);
    }
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive_at(at(&s_.factors_full[own.at]));
  }

  const Problem& p_;
  Shared<Cfg>& s_;
  uint32_t base_;
  int rank_;  // of the block in its cluster
  int group_, warp_, lane_;
  int tokens_, chunks_, first_;
  DecayParams params_;
  float shift_[kOwn];
};

}  // namespace flashkda::cuda::sm90::prefill
