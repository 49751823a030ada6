// The factor warps: a pair of them turns a chunk's k, q and g into the factors that multiply the
// state. With e_t = exp(g_t),
//
//   k_bar_t   = k_t e_1 .. e_t          q_bar_t = q_t e_1 .. e_t        decay = e_1 .. e_C
//   k_tilde_t = k_t e_{t+1} .. e_C      k_hat_t = k_tilde_t / decay
//
// are products of numbers <= 1, but for k_hat, which is only read where it stays in bf16's range. A
// warp owns 64 channels and a lane two of them, over all tokens of the chunk: nothing is exchanged.
#pragma once

#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../ptx.cuh"
#include "shared.cuh"
#include "tile.cuh"
#include "work.cuh"

namespace flashkda::cuda::sm90::prefill {

using Bf16 = ElementTraits<__nv_bfloat16>;

// k exp(-G) holds while exp(-G_C) and k exp(-G_C) stay in bf16's range.
inline constexpr float kSmallestDecay = 1.7e-35f;  // just under exp(-80), which a gate of lower bound -5 never passes

template <class Cfg>
class FactorWarp {
 public:
  __device__ FactorWarp(const Problem& p, const Work& w, Shared<Cfg>& s, int warp, int lane)
      : p_(p), w_(w), s_(s), pair_(warp / 2), half_(warp % 2), lane_(lane) {
    params_ = load_decay_params(p, w.hv);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      shift_[c] = load_shift(p, params_, w.hv, half_ * kHalf + 2 * lane + c);
    }
  }

  __device__ void run() {
    Cursor<kRaw> raw(pair_);
    Cursor<kSlots> slot(pair_);
    for (int c = pair_; c < w_.chunks; c += Cfg::kPairs) {
      // Addresses are cheaper to find again for every chunk than to keep.
      lane_ = ptx::opaque(lane_);
      make(c, raw, slot);
      raw.advance(Cfg::kPairs);
      slot.advance(Cfg::kPairs);
    }
  }

 private:
  template <class G>
  __device__ __forceinline__ void load_gate(float (&x)[kChunk][2], const char* g) const {
    const G* row = reinterpret_cast<const G*>(g) + half_ * kHalf + 2 * lane_;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      float2 y;
      if constexpr (sizeof(G) == 4) {
        y = *reinterpret_cast<const float2*>(row + i * kChannels);
      } else {
        y = ElementTraits<G>::unpack(*reinterpret_cast<const uint32_t*>(row + i * kChannels));
      }
      x[i][0] = y.x;
      x[i][1] = y.y;
    }
  }

  template <Gate kGate>
  __device__ __forceinline__ void activate(float (&e)[kChunk][2]) const {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      e[i][0] = decay_of<kGate>(e[i][0], params_, shift_[0]);
      e[i][1] = decay_of<kGate>(e[i][1], params_, shift_[1]);
    }
  }

  // e = exp(g).
  __device__ __forceinline__ void load_decays(float (&e)[kChunk][2], const char* g) const {
    switch (p_.g.dtype) {
      case DType::kF32:
        load_gate<float>(e, g);
        break;
      case DType::kBF16:
        load_gate<__nv_bfloat16>(e, g);
        break;
      default:
        load_gate<__half>(e, g);
    }
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

  __device__ __forceinline__ void make(int chunk, const Cursor<kRaw>& raw_at,
                                       const Cursor<kSlots>& slot) const {
    const Raw& raw = s_.raw[raw_at.at];
    Factors& to = s_.factors[slot.at];
    Squares& squares = s_.squares[slot.at];
    const int64_t left = w_.tokens - int64_t{chunk} * kChunk;
    ptx::mbarrier_wait_suspended(&s_.raw_full[raw_at.at], raw_at.parity);
    float e[kChunk][2];
    load_decays(e, raw.g);

    // The lane's channels in row i of a half; eight rows on, the swizzle is the same.
    const auto place = [&](int i) {
      return i * kRowBytes + (((lane_ / 4) ^ (i & 7)) * kPiece) + (lane_ % 4) * 4;
    };
    const char* k_half = reinterpret_cast<const char*>(raw.k[half_]);
    const char* q_half = reinterpret_cast<const char*>(raw.q[half_]);
    uint32_t k[kChunk], q[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      k[i] = *reinterpret_cast<const uint32_t*>(k_half + place(i));
      q[i] = *reinterpret_cast<const uint32_t*>(q_half + place(i));
    }
    if (left < kChunk) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const bool inside = i < left;
        e[i][0] = inside ? e[i][0] : 1.f;
        e[i][1] = inside ? e[i][1] : 1.f;
        k[i] = inside ? k[i] : 0;
        q[i] = inside ? q[i] : 0;
      }
    }

    ptx::mbarrier_wait_suspended(&s_.empty[slot.at], slot.parity ^ 1);
    char* bars = reinterpret_cast<char*>(to.bars[half_]);
    float x0 = 1.f, x1 = 1.f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      x0 *= e[i][0];
      x1 *= e[i][1];
      const float2 ki = Bf16::unpack(k[i]), qi = Bf16::unpack(q[i]);
      *reinterpret_cast<uint32_t*>(bars + place(i)) = Bf16::pack(ki.x * x0, ki.y * x1);
      *reinterpret_cast<uint32_t*>(bars + place(i) + kChunk * kRowBytes) =
          Bf16::pack(qi.x * x0, qi.y * x1);
    }
    *reinterpret_cast<float2*>(squares.decay + half_ * kHalf + 2 * lane_) = make_float2(x0, x1);
    const bool steep = __any_sync(~0u, x0 < kSmallestDecay || x1 < kSmallestDecay);
    if (lane_ == 0) squares.steep[half_] = steep;

    const float inverse0 = ptx::rcp(x0), inverse1 = ptx::rcp(x1);
    char* k_tilde = reinterpret_cast<char*>(to.k_tilde[half_]);
    char* k_hat = reinterpret_cast<char*>(to.k_hat[half_]);
    x0 = x1 = 1.f;
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      const float2 ki = Bf16::unpack(k[i]);
      const float k0 = ki.x * x0, k1 = ki.y * x1;
      *reinterpret_cast<uint32_t*>(k_tilde + place(i)) = Bf16::pack(k0, k1);
      *reinterpret_cast<uint32_t*>(k_hat + place(i)) = Bf16::pack(k0 * inverse0, k1 * inverse1);
      x0 *= e[i][0];
      x1 *= e[i][1];
    }
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(&s_.factors_full[slot.at]);
    ptx::mbarrier_arrive(&s_.raw_empty[raw_at.at]);
  }

  const Problem& p_;
  const Work& w_;
  Shared<Cfg>& s_;
  int pair_, half_, lane_;
  DecayParams params_;
  float shift_[2];
};

}  // namespace flashkda::cuda::sm90::prefill
