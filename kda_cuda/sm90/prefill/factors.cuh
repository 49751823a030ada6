// The factor warps: they turn a chunk's k, q and g into the factors that multiply the state, two
// warpgroups a part each, one both. With m the middle of the chunk,
//
//   left = (k, q) exp(G - G_m)    right = k exp(G_m - G)    a = exp(G_m)    b = exp(G_C - G_m)
//
// With the products P_t of a part's e_s = exp(g_s) up to t and Q_t of those after t, left is P / a
// and right Q in the early part, left P and right Q / b in the late one. Where a channel's a or b
// is smaller than bf16's range allows, that bound takes its place: what is multiplied by it is
// nothing. Only products of tokens of one part with each other then need other factors, and get
// them in the place of the part's q, k and g (Decay in shared.cuh).
//
// A warp owns 32 channels and a lane four of them, over four neighbouring tokens (a span), so that
// the running products need two exchanges between lanes. The code is kept small on purpose: what
// does not fit the instruction cache is paid for by all roles.
#pragma once

#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../ptx.cuh"
#include "shared.cuh"
#include "splits.cuh"
#include "tile.cuh"
#include "turn.cuh"

namespace flashkda::cuda::sm90::prefill {

using Bf16 = ElementTraits<__nv_bfloat16>;

template <class Cfg>
class FactorWarp {
  static constexpr int kSpan = 4;  // tokens of a lane
  static constexpr int kOwn = 4;   // channels of a lane

  using Decays = float[kSpan][kOwn];
  using Bits = uint2[kSpan];  // of four 16-bit elements a token

 public:
  __device__ FactorWarp(const Problem& p, const Work& w, Shared<Cfg>& s, int rank, int warp,
                        int lane)
      : p_(p),
        s_(s),
        rank_(rank),
        group_(warp / 4),
        warp_(warp % 4),
        lane_(lane),
        tokens_(static_cast<int>(w.tokens)),
        chunks_(w.chunks) {
    load_head(w.hv);
  }

  __device__ void run() {
    if (p_.g.dtype == DType::kF32) {
      run_with<float>();
    } else {
      run_with<__nv_bfloat16>();
    }
  }

 private:
  static __device__ __forceinline__ uint32_t at(const void* part) {
    return ptx::smem_address(part);
  }

  __device__ __forceinline__ void load_head(int hv) {
    params_ = load_decay_params(p_, hv);
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      shift_[c] = load_shift(p_, params_, hv, warp_ * kQuarter + lane_ % 8 * kOwn + c);
    }
  }

  template <class G>
  __device__ __forceinline__ void run_with() {
    switch (p_.gate) {
      case Gate::kBounded:
        return walk<Gate::kBounded, G>();
      case Gate::kSoftplus:
        return walk<Gate::kSoftplus, G>();
      default:
        return walk<Gate::kGiven, G>();
    }
  }

  // G: the gate's type.
  template <Gate kGate, class G>
  __device__ __forceinline__ void walk() {
    Cursor<kRaw> raw(0);
    Turn<Cfg> turn(rank_, 0);
#pragma unroll 1
    for (int c; (c = turn.chunk()) < chunks_; turn.advance(1)) {
      // Addresses are cheaper to find again for every chunk than to keep.
      lane_ = ptx::opaque_lane(lane_);
      if constexpr (Cfg::kHeads > 1) {
        if (!has_chain<Cfg>(rank_)) load_head(s_.origins[turn.head()].hv);
      }
      int splits = 0;  // by parts
#pragma unroll 1
      for (int part = group_; part < 2; part += Cfg::kFactorGroups) {
        const int decay = make<kGate, G>(part, tokens_ - c * kChunk - part * kPart, raw, turn);
        splits |= (decay == kSplits) << part;
      }
      ptx::fence_async_proxy();
      ptx::mbarrier_arrive_at(at(&s_.factors_full[raw.at / 2]));
#pragma unroll 1
      for (int part = group_; splits != 0 && part < 2; part += Cfg::kFactorGroups) {
        if (splits >> part & 1) {
          split<kGate, G>(part, tokens_ - c * kChunk - part * kPart, raw.at + part, raw.parity);
        }
      }
      raw.advance(makes_few<Cfg>(rank_) ? kRaw : 2);
    }
  }

  // Where the lane's tokens lie, in tiles and in fp32 quarters of 128-byte rows. Four rows on, the
  // swizzle differs in its third bit: neighbouring spans meet in no bank.
  struct Place {
    int corner, piece, quarter_piece;

    __device__ __forceinline__ Place(int lane, int warp) {
      const int span = lane / 8;
      corner = span * kSpan * kRowBytes;
      piece = ((warp % 2 * 4 + lane % 8 / 2) ^ (span % 2 * 4)) * kPiece + lane % 2 * 8;
      quarter_piece = (lane % 8 ^ (span % 2 * 4)) * kPiece;
    }
    __device__ __forceinline__ int operator()(int i) const {
      return corner + i * kRowBytes + (piece ^ i * kPiece);
    }
    __device__ __forceinline__ int wide(int i) const {
      return corner + i * kRowBytes + (quarter_piece ^ i * kPiece);
    }
  };

  // Four elements from one place of a tile.
  static __device__ __forceinline__ void unpack(float (&x)[kOwn], uint2 bits) {
    const float2 low = Bf16::unpack(bits.x), high = Bf16::unpack(bits.y);
    x[0] = low.x;
    x[1] = low.y;
    x[2] = high.x;
    x[3] = high.y;
  }

  static __device__ __forceinline__ void store(char* place, const float (&x)[kOwn],
                                               const float (&factor)[kOwn]) {
    *reinterpret_cast<uint2*>(place) = make_uint2(Bf16::pack(x[0] * factor[0], x[1] * factor[1]),
                                                  Bf16::pack(x[2] * factor[2], x[3] * factor[3]));
  }

  // exp(g) of the lane's tokens; 1 from token `left` of the part on.
  template <Gate kGate, class G>
  __device__ __forceinline__ void load_decays(Decays& e, const Raw& raw, int left,
                                              const Place& place) const {
    if constexpr (sizeof(G) == 4) {
      const char* quarter = raw.g + warp_ * sizeof(raw.k[0]);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const float4 y = *reinterpret_cast<const float4*>(quarter + place.wide(i));
        e[i][0] = y.x;
        e[i][1] = y.y;
        e[i][2] = y.z;
        e[i][3] = y.w;
      }
    } else {
      const char* g = raw.g + warp_ / 2 * sizeof(raw.k[0]);
#pragma unroll
      for (int i = 0; i < kSpan; ++i) unpack(e[i], *reinterpret_cast<const uint2*>(g + place(i)));
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) e[i][c] = decay_of<kGate>(e[i][c], params_, shift_[c]);
    }
    if (left < kPart) {
      beyond(left, [&](int i) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) e[i][c] = 1.f;
      });
    }
  }

  // k and q of the lane's tokens; 0 from token `left` of the part on.
  __device__ __forceinline__ void load_tokens(Bits& k, Bits& q, const Raw& raw, int left,
                                              const Place& place) const {
    const int half = warp_ / 2;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      k[i] = *reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(raw.k[half]) + place(i));
      q[i] = *reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(raw.q[half]) + place(i));
    }
    if (left < kPart) beyond(left, [&](int i) { k[i] = q[i] = make_uint2(0, 0); });
  }

  // Does something to those of the lane's tokens that are not below `left`.
  template <class Do>
  __device__ __forceinline__ void beyond(int left, const Do& something) const {
#pragma unroll 1
    for (int t = max(left, 0); t < kPart; ++t) {  // rolled, lest it be done always
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        if (lane_ / 8 * kSpan + i == t) something(i);
      }
    }
  }

  // Where factors go. right_flip: what the right ones' places differ in from the left ones'.
  struct Tiles {
    char *left_k, *left_q, *right;
    int right_flip;
  };

  // Writes products of decays with k and q, from those before the lane's span and after it on.
  static __device__ __forceinline__ void write(const Tiles& to, const Bits& k, const Bits& q,
                                               const Decays& e, float (&before)[kOwn],
                                               float (&after)[kOwn], const Place& place) {
    Decays later;
#pragma unroll
    for (int i = kSpan - 1; i >= 0; --i) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        later[i][c] = after[c];
        after[c] *= e[i][c];
      }
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      float x[kOwn];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) before[c] *= e[i][c];
      unpack(x, k[i]);
      store(to.left_k + place(i), x, before);
      store(to.right + (place(i) ^ to.right_flip), x, later[i]);
      unpack(x, q[i]);
      store(to.left_q + place(i), x, before);
    }
  }

  // Of a channel's decays over the lane's tokens.
  static __device__ __forceinline__ float product(const Decays& e, int c) {
    return (e[0][c] * e[1][c]) * (e[2][c] * e[3][c]);
  }

  // The smallest a or b that leaves k and q over it in range.
  static __device__ __forceinline__ float smallest_decay(const Bits& k, const Bits& q) {
    __nv_bfloat162 largest = __float2bfloat162_rn(0.f);
    const auto meet = [&](uint32_t x) {
      largest = __hmax2(largest, __habs2(reinterpret_cast<__nv_bfloat162&>(x)));
    };
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      meet(k[i].x);
      meet(k[i].y);
      meet(q[i].x);
      meet(q[i].y);
    }
    const float own = fmaxf(__low2float(largest), __high2float(largest));
    // Of numbers >= 0, the bits are in order too.
    const float all = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(own)));
    return fmaxf(all * 0x1p-126f, kSmallestBf16Decay);
  }

  static __device__ __forceinline__ bool any_below(const float (&x)[kOwn], float bound) {
    return __any_sync(~0u, fminf(fminf(x[0], x[1]), fminf(x[2], x[3])) < bound);
  }

  // A part of a chunk. raw_at: of the chunk's early part.
  template <Gate kGate, class G>
  __device__ __forceinline__ int make(int part, int left, const Cursor<kRaw>& raw_at,
                                      const Turn<Cfg>& turn) const {
    const int raw_slot = raw_at.at + part;
    Raw& raw = s_.raw[raw_slot];
    Slot& slot = s_.slots[turn.place()];
    const Place place(lane_, warp_);
    const int span = lane_ / 8, half = warp_ / 2;

    ptx::mbarrier_wait_at(at(&s_.raw_full[raw_slot]), raw_at.parity);
    Bits k, q;
    Decays e;
    load_decays<kGate, G>(e, raw, left, place);

    // Products of the decays over the part, before the lane's span and after it.
    float total[kOwn], before[kOwn], after[kOwn];
    int decay = kUsual;
    {
      float pair[kOwn];  // over eight tokens
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const float own = product(e, c), beside = __shfl_xor_sync(~0u, own, 8);
        pair[c] = own * beside;
        const float others = __shfl_xor_sync(~0u, pair[c], 16);
        total[c] = pair[c] * others;
        before[c] = (span & 1 ? beside : 1.f) * (span & 2 ? others : 1.f);
        after[c] = (span & 1 ? 1.f : beside) * (span & 2 ? 1.f : others);
      }
      // Above this, k and q may be as large as 3e5.
      if (any_below(total, 1e-33f)) {
        load_tokens(k, q, raw, left, place);
        const float bound = smallest_decay(k, q);
        if (any_below(total, bound)) decay = any_below(pair, bound) ? kSplits : kSteep;
#pragma unroll
        for (int c = 0; c < kOwn; ++c) total[c] = fmaxf(total[c], bound);
      }
    }
    ptx::mbarrier_wait_at(at(&s_.empty[turn.stage]), turn.parity ^ 1);
    load_tokens(k, q, raw, left, place);
    if (lane_ == 0) s_.decay[raw_at.at / 2][part][warp_] = decay;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const float inverse = ptx::rcp(total[c]);
      before[c] *= part == 0 ? inverse : 1.f;
      after[c] *= part == 0 ? 1.f : inverse;
    }
    if (lane_ < 8) {
      float* to =
          (part == 0 ? slot.enter : slot.leave) + decay_place(warp_ * kQuarter + lane_ * kOwn);
      constexpr int kNext = decay_place(2) - decay_place(0);
      *reinterpret_cast<float2*>(to) = make_float2(total[0], total[1]);
      *reinterpret_cast<float2*>(to + kNext) = make_float2(total[2], total[3]);
    }
    write(Tiles{reinterpret_cast<char*>(slot.left[half][part * kPart]),
                reinterpret_cast<char*>(slot.left[half][kChunk + part * kPart]),
                reinterpret_cast<char*>(slot.right[half][part * kPart]), 0},
          k, q, e, before, after, place);
    if (decay == kSteep) {
      // The same about the middle of the part.
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const float own = product(e, c), beside = __shfl_xor_sync(~0u, own, 8);
        const float inverse = ptx::rcp(own * beside);
        before[c] = (span & 1 ? beside : 1.f) * (span & 2 ? 1.f : inverse);
        after[c] = (span & 1 ? 1.f : beside) * (span & 2 ? inverse : 1.f);
      }
      ptx::mbarrier_wait_at(at(&s_.norms[raw_slot]), raw_at.parity);
      __syncwarp();
      const SteepRight right = steep_right(p_.g.dtype, warp_);
      write(Tiles{reinterpret_cast<char*>(raw.k[half]), reinterpret_cast<char*>(raw.q[half]),
                  raw.g + right.offset, (right.piece ^ warp_ % 2 * 4) * kPiece},
            k, q, e, before, after, place);
    }
    return decay;
  }

  // Meets the square warp at every level of splits.
  template <Gate kGate, class G>
  __device__ __forceinline__ void split(int part, int left, int raw_slot, uint32_t parity) const {
    Raw& raw = s_.raw[raw_slot];
    const Place place(lane_, warp_);
    const int span = lane_ / 8, half = warp_ / 2;
    Bits k, q;
    Decays e;
    load_decays<kGate, G>(e, raw, left, place);
    load_tokens(k, q, raw, left, place);
    float beside[kOwn];
#pragma unroll
    for (int c = 0; c < kOwn; ++c) beside[c] = __shfl_xor_sync(~0u, product(e, c), 8);
    const uint32_t meeting = at(&s_.meeting[raw_slot][warp_]);
    ptx::mbarrier_wait_at(at(&s_.norms[raw_slot]), parity);
    __syncwarp();
#pragma unroll 1
    for (int level = kPart / 2; level > 0; level /= 2) {
      // The products of decays between the level's middle and the lane's tokens, where all of the
      // span is on one side of it, or two tokens, or one.
      Decays f;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const float between = level == 8 ? beside[c] : 1.f;
        if (level == 1) {
          f[0][c] = f[2][c] = 1.f;
          f[1][c] = e[1][c];
          f[3][c] = e[3][c];
        } else if (level == 2) {
          f[0][c] = e[1][c];
          f[1][c] = 1.f;
          f[2][c] = e[2][c];
          f[3][c] = e[2][c] * e[3][c];
        } else if (kSpan * span & level) {
          f[0][c] = (span & 1 ? between : 1.f) * e[0][c];
          f[1][c] = f[0][c] * e[1][c];
          f[2][c] = f[1][c] * e[2][c];
          f[3][c] = f[2][c] * e[3][c];
        } else {
          f[3][c] = span & 1 ? 1.f : between;
          f[2][c] = f[3][c] * e[3][c];
          f[1][c] = f[2][c] * e[2][c];
          f[0][c] = f[1][c] * e[1][c];
        }
      }
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        float x[kOwn];
        unpack(x, k[i]);
        store(reinterpret_cast<char*>(raw.k[half]) + place(i), x, f[i]);
        unpack(x, q[i]);
        store(reinterpret_cast<char*>(raw.q[half]) + place(i), x, f[i]);
      }
      ptx::fence_async_proxy();  // after the last level the copy engine writes here
      meet(meeting, 0);
      meet(meeting, 1);
    }
  }

  const Problem& p_;
  Shared<Cfg>& s_;
  int rank_;  // of the block in its cluster
  int group_, warp_, lane_;
  int tokens_, chunks_;
  DecayParams params_;
  float shift_[kOwn];
};

}  // namespace flashkda::cuda::sm90::prefill
