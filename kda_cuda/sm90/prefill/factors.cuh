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
#include "tile.cuh"
#include "turn.cuh"

namespace flashkda::cuda::sm90::prefill {

using Bf16 = ElementTraits<__nv_bfloat16>;

// At a chunk's factors: of every part's threads, or, where one warpgroup makes both, once.
template <class Cfg>
inline constexpr int kFactorArrivals = (Cfg::kFactorGroups > 1 ? 2 : 1) * kGroupThreads;

template <class Cfg, Gate kGate>
class FactorWarp {
  static constexpr int kSpan = 4;  // tokens of a lane
  static constexpr int kOwn = 4;   // channels of a lane

  // Where a block has two factor warpgroups, lanes have registers to keep what they need of a gate.
  static constexpr bool kKeepsGate = Cfg::kFactorGroups > 1;

  using Decays = float[kSpan][kOwn];
  using Bits = uint2[kSpan];  // of four 16-bit elements a token

  // Of a head's gate, for the lane's channels.
  struct LaneGate {
    DecayParams params;
    float shift[kOwn];
  };

 public:
  __device__ FactorWarp(const Problem& p, const Work& w, Shared<Cfg>& s, int rank, int group,
                        int warp, int lane)
      : p_(p),
        s_(s),
        rank_(rank),
        group_(group),
        warp_(warp),
        lane_(lane),
        tokens_(static_cast<int>(w.tokens)),
        chunks_(w.chunks) {
    if constexpr (kKeepsGate) gate_ = lane_gate(s.gate);
  }

  __device__ void run() {
    if (p_.g.dtype == DType::kF32) {
      walk<float>();
    } else {
      walk<__nv_bfloat16>();
    }
  }

 private:
  static __device__ __forceinline__ uint32_t at(const void* part) {
    return ptx::smem_address(part);
  }

  __device__ __forceinline__ LaneGate lane_gate(const HeadGate& gate) const {
    const float4 y = gate.shift[warp_ * (kQuarter / kOwn) + lane_ % 8];
    return {gate.params, {y.x, y.y, y.z, y.w}};
  }

  __device__ __forceinline__ LaneGate gate_of(const Turn<Cfg>& turn) const {
    if constexpr (kKeepsGate) {
      return gate_;
    } else {
      return lane_gate(Cfg::kHeads > 1 && !has_chain<Cfg>(rank_) ? s_.gates[turn.head()] : s_.gate);
    }
  }

  // G: the gate's type.
  template <class G>
  __device__ __forceinline__ void walk() {
    int part = group_ % 2;
    Cursor use(uses<Cfg>(rank_));
    Turn<Cfg> turn(rank_, 0);
    use.advance(group_ / 2);
    turn.advance(group_ / 2);
    const int groups = factor_groups<Cfg>(rank_);
#pragma unroll 1
    for (int c; (c = turn.chunk()) < chunks_;) {
      // Addresses are cheaper to find again for every chunk than to keep.
      lane_ = ptx::opaque_lane(lane_);
#pragma unroll 1
      for (; part < 2; part += groups) {
        make<G>(part, tokens_ - c * kChunk - part * kPart, use, turn);
      }
      ptx::fence_async_proxy();
      ptx::mbarrier_arrive_at(at(&s_.factors_full[use.at]));
      const int chunks = part / 2;
      part -= 2 * chunks;
      use.advance(chunks);
      turn.advance(chunks);
    }
  }

  // Where the lane's tokens of a part lie, in tiles and in fp32 quarters of 128-byte rows. Four
  // rows on, the swizzle differs in its third bit: neighbouring spans meet in no bank.
  struct Place {
    int corner, piece, quarter_piece;

    __device__ __forceinline__ Place(int lane, int warp, int part) {
      const int span = lane / 8;
      corner = (part * kPart + span * kSpan) * kRowBytes;
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

  // Of the lane's tokens and channels.
  template <class Do>
  static __device__ __forceinline__ void for_all(const Do& something) {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) something(i, c);
    }
  }

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

  // The same by factors that are rounded already: two products an instruction.
  static __device__ __forceinline__ void store(char* place, uint2 x, uint2 factor) {
    *reinterpret_cast<uint2*>(place) =
        make_uint2(Bf16::multiply(x.x, factor.x), Bf16::multiply(x.y, factor.y));
  }

  // The gate's inputs of the lane's tokens.
  template <class G>
  __device__ __forceinline__ void load_gate(Decays& e, const Raw& raw, const Place& place) const {
    if constexpr (sizeof(G) == 4) {
      const char* quarter = raw.g + warp_ * kTileBytes;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) {
        const float4 y = *reinterpret_cast<const float4*>(quarter + place.wide(i));
        e[i][0] = y.x;
        e[i][1] = y.y;
        e[i][2] = y.z;
        e[i][3] = y.w;
      }
    } else {
      const char* g = raw.g + warp_ / 2 * kTileBytes;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) unpack(e[i], *reinterpret_cast<const uint2*>(g + place(i)));
    }
  }

  // exp(g) of the lane's tokens; 1 from token `left` of the part on. large: softplus of large
  // inputs too, which is infinite otherwise.
  template <class G>
  __device__ __forceinline__ void load_decays(Decays& e, const Raw& raw, int left,
                                              const Place& place, const LaneGate& gate,
                                              bool large) const {
    load_gate<G>(e, raw, place);
    const DecayParams& params = gate.params;
    const auto input = [&](float x, int c) { return params.slope * x + gate.shift[c]; };
    if constexpr (kGate == Gate::kSoftplus) {
      for_all([&](int i, int c) { e[i][c] = softplus_over_ln2(input(e[i][c], c)); });
      if (large) {
        Decays x;
        load_gate<G>(x, raw, place);
        for_all([&](int i, int c) { e[i][c] = correct_large(e[i][c], input(x[i][c], c)); });
      }
      for_all([&](int i, int c) { e[i][c] = ptx::ex2(params.factor * e[i][c]); });
    } else {
      for_all([&](int i, int c) { e[i][c] = decay_of<kGate>(e[i][c], params, gate.shift[c]); });
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

  // Where factors go.
  struct Tiles {
    char *left_k, *left_q, *right;
  };

  // Writes products of decays with k and q, from those before the lane's span and after it on. Left
  // factors are rounded before they multiply, which costs o's error a twelfth at the most; right
  // ones are not, since every state is a sum of these.
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
      const uint2 left =
          make_uint2(Bf16::pack(before[0], before[1]), Bf16::pack(before[2], before[3]));
      store(to.left_k + place(i), k[i], left);
      store(to.left_q + place(i), q[i], left);
      unpack(x, k[i]);
      store(to.right + place(i), x, later[i]);
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

  // A part of a chunk.
  template <class G>
  __device__ __forceinline__ void make(int part, int left, const Cursor& use,
                                       const Turn<Cfg>& turn) const {
    Raw& raw = s_.raw[use.at % held<Cfg>(rank_)];
    Slot& slot = s_.slots[turn.place()];
    const Place place(lane_, warp_, part);
    const LaneGate gate = gate_of(turn);
    const int span = lane_ / 8, half = warp_ / 2;

    ptx::mbarrier_wait_at(at(&s_.raw_full[use.at]), use.parity);
    Bits k, q;
    Decays e;
    // Products of the decays over the part, before the lane's span and after it.
    float total[kOwn], before[kOwn], after[kOwn];
    int decay = kUsual;
    load_tokens(k, q, raw, left, place);
    const auto multiply_all = [&] {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const float own = product(e, c), beside = __shfl_xor_sync(~0u, own, 8);
        const float pair = own * beside, others = __shfl_xor_sync(~0u, pair, 16);
        total[c] = pair * others;
        before[c] = span & 1 ? beside : 1.f;
        after[c] = span & 1 ? 1.f : beside;
        if (span & 2) {
          before[c] *= others;
        } else {
          after[c] *= others;
        }
      }
    };
    load_decays<G>(e, raw, left, place, gate, false);
    multiply_all();
    // Above this, k and q may be as large as 3e5.
    if (any_below(total, 1e-33f)) {
      // Once more where softplus was infinite and is not: rarely.
      if (kGate == Gate::kSoftplus && has_large(gate.params)) {
        load_decays<G>(e, raw, left, place, gate, true);
        multiply_all();
      }
      const float bound = smallest_decay(k, q);
      if (any_below(total, bound)) decay = kSteep;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) total[c] = fmaxf(total[c], bound);
    }
    ptx::mbarrier_wait_at(at(&s_.empty[turn.stage]), turn.parity ^ 1);
    if (lane_ == 0) s_.decay[use.at][part][warp_] = decay;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const float inverse = ptx::rcp(total[c]);
      if (part == 0) {
        before[c] *= inverse;
      } else {
        after[c] *= inverse;
      }
    }
    if (lane_ < 8) {
      float* to =
          (part == 0 ? slot.enter : slot.leave) + decay_place(warp_ * kQuarter + lane_ * kOwn);
      constexpr int kNext = decay_place(2) - decay_place(0);
      *reinterpret_cast<float2*>(to) = make_float2(total[0], total[1]);
      *reinterpret_cast<float2*>(to + kNext) = make_float2(total[2], total[3]);
    }
    write(Tiles{reinterpret_cast<char*>(slot.left[half]),
                reinterpret_cast<char*>(slot.left[half][kChunk]),
                reinterpret_cast<char*>(slot.right[half])},
          k, q, e, before, after, place);
    if (decay == kSteep) {
      ptx::mbarrier_wait_at(at(&s_.norms[use.at][part]), use.parity);
      __syncwarp();
      write_steep(part, raw, s_.scratch[use.at % 2 * 2 + part].near[warp_], k, q, e);
    }
  }

  // What the square warp makes the products within a steep part of (steep.cuh).
  __device__ __forceinline__ void write_steep(int part, Raw& raw, Near& near, const Bits& k,
                                              const Bits& q, const Decays& e) const {
    const int lane = ptx::opaque_lane(lane_);  // nothing of this is to be kept
    const int span = lane / 8, half = warp_ / 2;
    const Place place(lane, warp_, part);
    const Place lower(span == 3 ? lane % 8 : lane, warp_, part);  // of q split at its half's middle
    const SteepK halves = steep_k(p_.g.dtype, warp_);
    const int flip = (halves.piece ^ warp_ % 2 * 4) * kPiece;
    char* const to_k = reinterpret_cast<char*>(raw.k[half]);
    char* const to_q = reinterpret_cast<char*>(raw.q[half]);
    // From the middle of the lane's half, and of the part, to its span or on from it.
    float far[kOwn];
    Decays before, after;
#pragma unroll
    for (int c = 0; c < kOwn; ++c) {
      const float beside = __shfl_xor_sync(~0u, product(e, c), 8);
      far[c] = span == 0 || span == 3 ? beside : 1.f;
      before[0][c] = e[0][c];
      after[kSpan - 1][c] = 1.f;
#pragma unroll
      for (int i = 1; i < kSpan; ++i) {
        before[i][c] = before[i - 1][c] * e[i][c];
        after[kSpan - 1 - i][c] = after[kSpan - i][c] * e[kSpan - i][c];
      }
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      float x[kOwn], y[kOwn], by_half[kOwn], by_part[kOwn];
      unpack(x, k[i]);
      unpack(y, q[i]);
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        by_half[c] = span & 1 ? before[i][c] : after[i][c];
        by_part[c] = (span & 2 ? before[i][c] : after[i][c]) * far[c];
      }
      store(raw.g + halves.offset + (place(i) ^ flip), x, by_half);
      store(to_k + place(i), x, by_part);
      if (span & 2) store(to_q + place(i), y, by_part);
      if (span & 1) store(to_q + lower(i), y, by_half);
    }
    // Summed over the eight lanes of the span, each of which keeps fewer of the sums in every
    // round.
    float sums[2 * kNearPairs] = {};
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
      float right[kOwn], x[kOwn];
      unpack(right, k[j]);
#pragma unroll
      for (int i = j + 1; i < kSpan; ++i) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) right[c] *= e[i][c];
        unpack(x, k[i]);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) sums[near_pair(i, j)] += x[c] * right[c];
        unpack(x, q[i]);
#pragma unroll
        for (int c = 0; c < kOwn; ++c) sums[kNearPairs + near_pair(i, j)] += x[c] * right[c];
      }
    }
    constexpr int kHalf = kNearPairs, kFourth = kNearPairs / 2;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) add_halves(sums[i], sums[kHalf + i], 4, lane);
#pragma unroll
    for (int i = 0; i < kFourth; ++i) add_halves(sums[i], sums[kFourth + i], 2, lane);
#pragma unroll
    for (int i = 0; i < kFourth; ++i) {
      sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
      if (lane % 2 == 0) near[span][lane / 4 % 2 * kHalf + lane / 2 % 2 * kFourth + i] = sums[i];
    }
  }

  // Of two sums, lanes without this bit keep the first, and lanes with it the second.
  static __device__ __forceinline__ void add_halves(float& first, float second, int bit, int lane) {
    const float kept = lane & bit ? second : first, given = lane & bit ? first : second;
    first = kept + __shfl_xor_sync(~0u, given, bit);
  }

  const Problem& p_;
  Shared<Cfg>& s_;
  int rank_;  // of the block in its team
  int group_, warp_, lane_;
  int tokens_, chunks_;
  LaneGate gate_;  // if kKeepsGate
};

}  // namespace flashkda::cuda::sm90::prefill
