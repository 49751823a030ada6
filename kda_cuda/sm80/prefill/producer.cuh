// The producers: each, four warps, turns whole chunks of 16 tokens, one after another, into the
// factors that the chain and the helpers read.
//
// A warp owns a quarter of the channels and a lane two of them, over 8 or 4 neighbouring tokens, so
// that the decays' running products need one exchange between lanes. With e_t = exp(g_t),
//
//   k_bar_t   = k_t e_1 .. e_t          q_bar_t = q_t e_1 .. e_t
//   k_tilde_t = k_t e_{t+1} .. e_C      leave   = e_1 .. e_C
//
// are products of numbers <= 1: they underflow only where they are nothing. The norms of k and q
// are kept apart as rk and rq and multiplied in where they cost least, but for fp16, where they
// come first. The diagonals of M and T, which weigh most, are kept apart in fp32.
//
// A and M are products of k_bar and q_bar with k / (e_1 .. e_t), which must stay in the element's
// range. A chunk in which it would not has its factors about the middle of their range: k_bar and
// q_bar are over enter, a power of two near the root of e_1 .. e_C, k / (e_1 .. e_t) is times
// enter, and the chain multiplies S by enter first. That holds for decays down to the square of
// what it holds for without. Chunks with a steeper channel yet have A and M made from splits.
//
// The code is kept small on purpose: producers are at different places at a time, and what does not
// fit the instruction cache is paid for by all (docs/performance.md).
#pragma once

#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../../common/ptx.cuh"
#include "../../common/tile.cuh"
#include "helper.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

inline constexpr uint32_t kFullWarp = 0xffffffffu;

// k / exp(G) stays in the element's range down to this decay of a chunk.
template <class Elem>
inline constexpr float kSmallestDecay = 0.f;
template <>
inline constexpr float kSmallestDecay<__nv_bfloat16> = kSmallestBf16Decay;
template <>
inline constexpr float kSmallestDecay<__half> = 0.0625f;  // 2^-4

// The smallest enter, as an exponent of two: times a state or over a k or q, it leaves these a part
// of the element's range.
template <class Elem>
inline constexpr float kSmallestEnter = 0.f;
template <>
inline constexpr float kSmallestEnter<__nv_bfloat16> = -90.f;
template <>
inline constexpr float kSmallestEnter<__half> = -4.f;

// A lane's place in its producer, and what producers do with tiles in shared memory.
template <class Cfg>
struct ProducerLane {
  using Elem = typename Cfg::Elem;
  using Traits = ElementTraits<Elem>;
  static constexpr int K = Cfg::K;
  static constexpr int kLanes = K / 8;           // that share a token
  static constexpr int kSpans = 32 / kLanes;     // of tokens in a warp
  static constexpr int kSpan = kChunk / kSpans;  // tokens of a lane

  int group, warp, lane;
  int span;     // which tokens of a chunk the lane has: span * kSpan + [0, kSpan)
  int channel;  // the first of its two channels
  int place;    // in row t of a tile the lane's channels are at place ^ (t % kSpan) * kPiece

  __device__ __forceinline__ ProducerLane(int group, int warp, int lane)
      : group(group),
        warp(warp),
        lane(lane),
        span(lane / kLanes),
        channel(warp * (K / kGroupWarps) + lane % kLanes * 2) {
    // For i < kSpan, swizzle(span * kSpan + i) is swizzle(span * kSpan) ^ i.
    place = span * kSpan * K * 2 + ((channel * 2 / kPiece) ^ swizzle<K>(span * kSpan)) * kPiece +
            channel * 2 % kPiece;
  }

  __device__ __forceinline__ void sync() const { ptx::barrier_sync(1 + group, kGroupThreads); }

  // The lane's two channels of its i-th token in a tile.
  __device__ __forceinline__ uint32_t* at(Elem* tile, int i) const {
    return reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(tile) + i * K * 2 +
                                       (place ^ (i * kPiece)));
  }

  __device__ __forceinline__ void load_tokens(uint32_t (&k)[kSpan], uint32_t (&q)[kSpan],
                                              Slot<Cfg>* slot) const {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      k[i] = *at(slot->k, i);
      q[i] = *at(slot->q, i);
    }
  }

  // The warp's quarter of A and M, before beta and the norms: rows 0-15 of k_bar (warps 0, 1) or
  // q_bar (warps 2, 3) with rows 0-7 or 8-15 of b. The accumulator holds row lane / 4 (+ 8), column
  // 8 (warp % 2) + 2 (lane % 4) + {0, 1}.
  __device__ __forceinline__ void multiply(float (&d)[4], const Elem* k_bar, const Elem* q_bar,
                                           const Elem* b) const {
    const LanePosition at_a = by_row(lane);
    const LanePosition at_b = by_piece(lane);
    const char* left = reinterpret_cast<const char*>(warp < 2 ? k_bar : q_bar);
    const char* right = reinterpret_cast<const char*>(b);
    float odd[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = 0.f;
#pragma unroll
    for (int kk = 0; kk < K / 16; kk += 2) {
      uint32_t a0[4], a1[4], fb[4];
      ldmatrix(a0, left + tile_offset<K>(at_a.row, 2 * kk + at_a.piece));
      ldmatrix(a1, left + tile_offset<K>(at_a.row, 2 * kk + 2 + at_a.piece));
      ldmatrix(fb, right + tile_offset<K>((warp % 2) * 8 + at_b.row, 2 * kk + at_b.piece));
      mma<Elem>(d, a0, fb[0], fb[1]);
      mma<Elem>(odd, a1, fb[2], fb[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += odd[i];
  }

  __device__ __forceinline__ int fragment_row(int i) const { return lane / 4 + (i / 2) * 8; }
  __device__ __forceinline__ int fragment_column(int i) const {
    return (warp % 2) * 8 + (lane % 4) * 2 + (i & 1);
  }

  static __device__ __forceinline__ uint32_t scaled(uint32_t x, float f0, float f1) {
    const float2 y = Traits::unpack(x);
    return Traits::pack(y.x * f0, y.y * f1);
  }

  // One level of the splits: tokens in the upper half of a block of 2 Half tokens against those in
  // its lower half, with the decay split at the middle of the block. span_decay: the product of
  // each span's decays.
  template <int Half>
  __device__ __forceinline__ void level(float (&d)[4], Slot<Cfg>* slot, const uint32_t (&k)[kSpan],
                                        const uint32_t (&q)[kSpan], const float (&e)[kSpan][2],
                                        const float (&span_decay)[kSpans][2]) const {
    constexpr int kBlock = Half < kSpan ? 2 * Half : kSpan;  // of the lane's own tokens
    bool upper = false;
    float before[2] = {1.f, 1.f},
          after[2] = {1.f, 1.f};  // between the lane's tokens and the middle
    if constexpr (Half >= kSpan) {
      constexpr int kHalfSpans = Half / kSpan;
      upper = (span / kHalfSpans) & 1;
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        const bool same = s / kHalfSpans == span / kHalfSpans;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          before[c] *= same && s < span ? span_decay[s][c] : 1.f;
          after[c] *= same && s > span ? span_decay[s][c] : 1.f;
        }
      }
    }
#pragma unroll
    for (int block = 0; block < kSpan; block += kBlock) {
      constexpr int kLower = Half < kSpan ? Half : kSpan;
      float x0 = after[0], x1 = after[1];
      if (Half < kSpan || !upper) {
#pragma unroll
        for (int i = block + kLower - 1; i >= block; --i) {
          *at(slot->k_bar, i) = scaled(k[i], x0, x1);
          x0 *= e[i][0];
          x1 *= e[i][1];
        }
      }
      x0 = before[0];
      x1 = before[1];
      if (Half < kSpan || upper) {
#pragma unroll
        for (int i = Half < kSpan ? block + Half : 0; i < block + kBlock; ++i) {
          x0 *= e[i][0];
          x1 *= e[i][1];
          *at(slot->k_bar, i) = scaled(k[i], x0, x1);
          *at(slot->k_tilde, i) = scaled(q[i], x0, x1);
        }
      }
    }
    sync();
    float level_d[4];
    multiply(level_d, slot->k_bar, slot->k_tilde, slot->k_bar);
    sync();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = fragment_row(r), j = fragment_column(r);
      if (i / (2 * Half) == j / (2 * Half) && (i & Half) && !(j & Half)) d[r] = level_d[r];
    }
  }

  // A and M by splits, stored. Uses the places of k_bar and k_tilde before they are there. Rows
  // that a level leaves unwritten are finite or masked.
  __device__ __forceinline__ void multiply_splits(Slot<Cfg>* slot, const float (&e)[kSpan][2],
                                                  const float (&span_decay)[kSpans][2]) const {
    uint32_t k[kSpan], q[kSpan];
    load_tokens(k, q, slot);
    float d[4] = {};
    level<1>(d, slot, k, q, e, span_decay);
    level<2>(d, slot, k, q, e, span_decay);
    level<4>(d, slot, k, q, e, span_decay);
    level<8>(d, slot, k, q, e, span_decay);
    QuarterFactors<Cfg>(slot, lane).store(slot, warp, lane, d);
  }
};

template <class Cfg>
struct Decays {
  float e[ProducerLane<Cfg>::kSpan][2];
  float span_decay[ProducerLane<Cfg>::kSpans][2];
};

// Not inlined, and given its numbers in memory: its registers would be spilled around the path that
// most chunks take.
template <class Cfg>
__device__ __noinline__ void multiply_splits(ProducerLane<Cfg> at, Slot<Cfg>* slot,
                                             const Decays<Cfg>* decays) {
  at.multiply_splits(slot, decays->e, decays->span_decay);
}

template <class Cfg>
class Producer {
  using Elem = typename Cfg::Elem;
  using Traits = ElementTraits<Elem>;
  using Lane = ProducerLane<Cfg>;
  static constexpr int K = Cfg::K;
  static constexpr int kLanes = Lane::kLanes;
  static constexpr int kSpans = Lane::kSpans;
  static constexpr int kSpan = Lane::kSpan;

 public:
  __device__ Producer(const Problem& p, const Work& w, int slots, char* smem, int group, int warp,
                      int lane)
      : p_(p),
        w_(w),
        slots_(slots),
        smem_(smem),
        at_(group, warp, lane),
        gate_(ptx::opaque(static_cast<int>(p.gate))),
        gate_dtype_(ptx::opaque(static_cast<int>(p.g.dtype))),
        params_(load_decay_params(p, w.hv)) {
#pragma unroll
    for (int c = 0; c < 2; ++c) shift_[c] = load_shift(p, params_, w.hv, at_.channel + c);
  }

  __device__ void run() {
    RingPosition at(at_.group);
    // 2^31 tokens fit no GPU's memory.
    int left = static_cast<int>(w_.tokens) - at_.group * Cfg::kStep;
#pragma unroll 1
    for (; left > 0; left -= Cfg::kProducers * Cfg::kStep) {
      // Addresses are cheaper to find again for every chunk than to keep: kept, they were spilled.
      at_.lane = ptx::opaque(at_.lane);
      at_.place = ptx::opaque(at_.place);
      at_.span = ptx::opaque(at_.span);
      at_.channel = ptx::opaque(at_.channel);
      make(min(left, kChunk), at);
      at.advance(Cfg::kProducers, slots_);
    }
  }

 private:
  template <class G>
  __device__ __forceinline__ void load_gate(float (&x)[kSpan][2], Slot<Cfg>* slot) const {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      float2 y;
      if constexpr (sizeof(G) == 4) {
        y = *(reinterpret_cast<const float2*>(slot->g) +
              ((at_.span * kSpan + i) * K + at_.channel) / 2);
      } else {
        y = ElementTraits<G>::unpack(*at_.at(slot->k_bar, i));  // where g lies
      }
      x[i][0] = y.x;
      x[i][1] = y.y;
    }
  }

  template <Gate kGate>
  __device__ __forceinline__ void activate_all(float (&e)[kSpan][2]) const {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      e[i][0] = decay_of<kGate>(e[i][0], params_, shift_[0]);
      e[i][1] = decay_of<kGate>(e[i][1], params_, shift_[1]);
    }
  }

  // e = exp(g), 1 past the sequence's end.
  __device__ __forceinline__ void load_decays(float (&e)[kSpan][2], Slot<Cfg>* slot,
                                              int rows) const {
    switch (static_cast<DType>(gate_dtype_)) {
      case DType::kF32:
        load_gate<float>(e, slot);
        break;
      case DType::kBF16:
        load_gate<__nv_bfloat16>(e, slot);
        break;
      default:
        load_gate<__half>(e, slot);
    }
    switch (static_cast<Gate>(gate_)) {
      case Gate::kBounded:
        activate_all<Gate::kBounded>(e);
        break;
      case Gate::kSoftplus:
        activate_all<Gate::kSoftplus>(e);
        break;
      default:
        activate_all<Gate::kGiven>(e);
    }
    if (rows == kChunk) return;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const bool inside = at_.span * kSpan + i < rows;
      e[i][0] = inside ? e[i][0] : 1.f;
      e[i][1] = inside ? e[i][1] : 1.f;
    }
  }

  // The lane's own channels of k and q over their norms, in place.
  __device__ __forceinline__ void normalise(Slot<Cfg>* slot) const {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const float rk = slot->norm_k[at_.span * kSpan + i];
      const float rq = slot->norm_q[at_.span * kSpan + i];
      *at_.at(slot->k, i) = Lane::scaled(*at_.at(slot->k, i), rk, rk);
      *at_.at(slot->q, i) = Lane::scaled(*at_.at(slot->q, i), rq, rq);
    }
  }

  template <int N>
  static __device__ __forceinline__ void copy_numbers(float (&to)[N][2],
                                                      const float (&from)[N][2]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to[i][0] = from[i][0];
      to[i][1] = from[i][1];
    }
  }

  // k_bar, q_bar, k / exp(G) and k_tilde from what the lane's first or last token has besides its
  // own e: before, from the factors' reference up to it; after, from it to the reference; and end,
  // which k_tilde has over k / exp(G).
  __device__ __forceinline__ void make_factors(Slot<Cfg>* slot, const uint32_t (&k)[kSpan],
                                               const uint32_t (&q)[kSpan],
                                               const float (&e)[kSpan][2], const float (&before)[2],
                                               const float (&after)[2],
                                               const float (&end)[2]) const {
    float x0 = after[0], x1 = after[1];
#pragma unroll
    for (int i = kSpan - 1; i >= 0; --i) {
      const float2 y = Traits::unpack(k[i]);
      const float k0 = y.x * x0, k1 = y.y * x1;
      *at_.at(slot->k, i) = Traits::pack(k0, k1);
      *at_.at(slot->k_tilde, i) = Traits::pack(k0 * end[0], k1 * end[1]);
      x0 *= e[i][0];
      x1 *= e[i][1];
    }
    x0 = before[0];
    x1 = before[1];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      x0 *= e[i][0];
      x1 *= e[i][1];
      *at_.at(slot->k_bar, i) = Lane::scaled(k[i], x0, x1);
      *at_.at(slot->q, i) = Lane::scaled(q[i], x0, x1);
    }
  }

  // Multiplies in the decays of the spans before and after the lane's.
  __device__ __forceinline__ void multiply_spans(float (&before)[2], float (&after)[2],
                                                 const float (&span_decay)[kSpans][2]) const {
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        before[c] *= s < at_.span ? span_decay[s][c] : 1.f;
        after[c] *= s > at_.span ? span_decay[s][c] : 1.f;
      }
    }
  }

  // The same about the middle of each channel's range, with enter stored; false where the range of
  // some channel of the chunk is too wide for that.
  __device__ __forceinline__ bool refer_to_middle(Slot<Cfg>* slot,
                                                  const float (&span_decay)[kSpans][2],
                                                  float (&before)[2], float (&after)[2],
                                                  float (&end)[2]) const {
    float exponent[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      exponent[c] = 0.f;
#pragma unroll
      for (int s = 0; s < kSpans; ++s) exponent[c] += 0.5f * ptx::lg2(span_decay[s][c]);
    }
    const bool far = fminf(exponent[0], exponent[1]) < kSmallestEnter<Elem>;
    if (ptx::barrier_any(1 + at_.group, kGroupThreads, far)) return false;
    float enter[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int n = __float2int_rn(fminf(exponent[c], 0.f));  // enter is at most 1
      enter[c] = __int_as_float((127 + n) << 23);
      before[c] = end[c] = __int_as_float((127 - n) << 23);
      // In this order no product leaves fp32's range.
#pragma unroll
      for (int s = 0; s < kSpans; ++s) end[c] *= span_decay[s][c];
      after[c] = ptx::rcp(end[c]);
    }
    multiply_spans(before, after, span_decay);
    if (at_.span == 0) {
      *reinterpret_cast<uint32_t*>(slot->enter + paired(at_.channel)) =
          Traits::pack(enter[0], enter[1]);
    }
    return true;
  }

  __device__ __forceinline__ void make(int rows, const RingPosition& position) const {
    Slot<Cfg>* slot = slot_at<Cfg>(smem_, position.slot);
    Barriers* barriers = barriers_at(smem_);
    ptx::mbarrier_wait_idle(&barriers->raw[position.slot], position.parity);

    float e[kSpan][2];
    load_decays(e, slot, rows);
    // All loads come before any store: the compiler does not move a load over a store that may
    // alias it.
    uint32_t k[kSpan], q[kSpan];
    if constexpr (!kNarrow<Elem>) at_.load_tokens(k, q, slot);
    float span_decay[kSpans][2], decay[2];
    bool steep = false;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float own = 1.f;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) own *= e[i][c];
      decay[c] = 1.f;
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        span_decay[s][c] = __shfl_sync(kFullWarp, own, s * kLanes + at_.lane % kLanes);
        decay[c] *= span_decay[s][c];
      }
      steep |= decay[c] < kSmallestDecay<Elem>;
    }
    // From here on the places of k, q and g may be written.
    ptx::mbarrier_wait(&barriers->tokens[position.slot], position.parity);
    steep = ptx::barrier_any(1 + at_.group, kGroupThreads, steep);
    if constexpr (kNarrow<Elem>) {
      if (p_.l2norm) normalise(slot);
      at_.load_tokens(k, q, slot);
    }
    float before[2] = {1.f, 1.f}, after[2], end[2];
    Reference reference = Reference::kStart;
    if (!steep) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        after[c] = ptx::rcp(decay[c]);
        end[c] = decay[c];
      }
      multiply_spans(before, after, span_decay);
    } else if (refer_to_middle(slot, span_decay, before, after, end)) {
      reference = Reference::kMiddle;
      decay[0] = end[0];
      decay[1] = end[1];
    } else {
      reference = Reference::kSplits;
      // Nothing is kept in registers over the call, lest it be spilled for every chunk.
      Decays<Cfg> copy;
      copy_numbers(copy.e, e);
      copy_numbers(copy.span_decay, span_decay);
      const Decays<Cfg>* decays = ptx::opaque(&copy);
      multiply_splits<Cfg>(at_, slot, decays);
      copy_numbers(e, decays->e);
      copy_numbers(span_decay, decays->span_decay);
      at_.load_tokens(k, q, slot);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        decay[c] = after[c] = end[c] = 1.f;
#pragma unroll
        for (int s = 0; s < kSpans; ++s) decay[c] *= span_decay[s][c];
      }
      multiply_spans(before, after, span_decay);
    }
    if (at_.span == 0) {
      *reinterpret_cast<float2*>(slot->leave + paired(at_.channel)) =
          make_float2(decay[0], decay[1]);
    }
    if (at_.channel == 0 && at_.span == 0) slot->reference = reference;
    make_factors(slot, k, q, e, before, after, end);
    ptx::mbarrier_arrive(&barriers->factors[position.slot]);
  }

  const Problem& p_;
  const Work& w_;
  int slots_;
  char* smem_;
  Lane at_;
  int gate_, gate_dtype_;  // of the problem, at hand
  DecayParams params_;
  float shift_[2];
};

}  // namespace flashkda::cuda::sm80::prefill
