// The producers: each, four warps, turns whole chunks of 16 tokens, one after another, into the
// factors that the chain reads.
//
// A warp owns a quarter of the channels and a lane two of them, over 8 or 4 neighbouring tokens, so
// that the decays' running products need one exchange between lanes; the 16 x 16 products of k_bar
// and q_bar with k then go through shared memory to the tensor cores, a quarter of them each warp.
// With e_t = exp(g_t),
//
//   k_bar_t   = k_t e_1 .. e_t          q_bar_t = q_t e_1 .. e_t
//   k_tilde_t = k_t e_{t+1} .. e_C      decay   = e_1 .. e_C
//
// are products of numbers <= 1: they underflow only where they are nothing. The norms of k and q
// are kept apart as rk and rq and multiplied in where they cost least, but for fp16, where they
// come first. The diagonals of M and T, which weigh most, are kept apart in fp32.
//
// The code is kept small on purpose: producers are at different places at a time, and what does not
// fit the instruction cache is paid for by all (docs/performance.md).
#pragma once

#include <type_traits>

#include "../../common/convert.cuh"
#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../../common/ptx.cuh"
#include "../../common/tile.cuh"
#include "../../common/triangle.cuh"
#include "loader.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

inline constexpr uint32_t kFullWarp = 0xffffffffu;
static_assert(kChunk == kTriangle && kAStride == kTriangleStride);

// The plain split k exp(G) * k exp(-G) holds while exp(-G_C) and k exp(-G_C) stay in the element's
// range.
template <class Elem>
inline constexpr float kSmallestDecay = 0.f;
template <>
inline constexpr float kSmallestDecay<__nv_bfloat16> = kSmallestBf16Decay;
template <>
inline constexpr float kSmallestDecay<__half> = 0.0625f;  // 2^-4

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

  // One level of the split for steep gates: tokens in the upper half of a block of 2 Half tokens
  // against those in its lower half, with the decay split at the middle of the block. span_decay:
  // the product of each span's decays.
  template <int Half>
  __device__ __forceinline__ void level(float (&d)[4], Slot<Cfg>* slot, const float (&e)[kSpan][2],
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
          *at(slot->k_bar, i) = scaled(*at(slot->k, i), x0, x1);
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
          *at(slot->k_bar, i) = scaled(*at(slot->k, i), x0, x1);
          *at(slot->k_tilde, i) = scaled(*at(slot->q, i), x0, x1);
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

  // A and M where exp(-G) leaves the element's range over the chunk but not over either half of it:
  // the same split with the decay taken from the middle of the chunk, k exp(G - G_8) * k exp(G_8 -
  // G). D: the decay of the lane's half.
  __device__ __forceinline__ void middle(float (&d)[4], Slot<Cfg>* slot, const float (&e)[kSpan][2],
                                         const float (&span_decay)[kSpans][2],
                                         const float (&D)[2]) const {
    constexpr int kHalfSpans = kSpans / 2;
    const bool upper = span >= kHalfSpans;
    float before[2], after[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float inverse = ptx::rcp(D[c]);
      before[c] = upper ? 1.f : inverse;
      after[c] = upper ? inverse : 1.f;
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        const bool same = s / kHalfSpans == span / kHalfSpans;
        before[c] *= same && s < span ? span_decay[s][c] : 1.f;
        after[c] *= same && s > span ? span_decay[s][c] : 1.f;
      }
    }
    uint32_t k[kSpan];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) k[i] = *at(slot->k, i);
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      before[0] *= e[i][0];
      before[1] *= e[i][1];
      *at(slot->k_bar, i) = scaled(k[i], before[0], before[1]);
      *at(slot->k_tilde, i) = scaled(*at(slot->q, i), before[0], before[1]);
    }
#pragma unroll
    for (int i = kSpan - 1; i >= 0; --i) {
      *at(slot->k, i) = scaled(k[i], after[0], after[1]);
      after[0] *= e[i][0];
      after[1] *= e[i][1];
    }
    sync();
    multiply(d, slot->k_bar, slot->k_tilde, slot->k);
    sync();
#pragma unroll
    for (int i = 0; i < kSpan; ++i) *at(slot->k, i) = k[i];
  }

  // A and M where some channel decays so much over the chunk that exp(-G) would leave the element's
  // range. Uses the places of k_bar and k_tilde before they are there. Rows that a level leaves
  // unwritten are finite or masked.
  __device__ __forceinline__ void multiply_steep(float (&d)[4], Slot<Cfg>* slot,
                                                 const float (&e)[kSpan][2],
                                                 const float (&span_decay)[kSpans][2]) const {
    float halves[2][2] = {{1.f, 1.f}, {1.f, 1.f}};
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
#pragma unroll
      for (int c = 0; c < 2; ++c) halves[s / (kSpans / 2)][c] *= span_decay[s][c];
    }
    const float least = fminf(fminf(halves[0][0], halves[0][1]), fminf(halves[1][0], halves[1][1]));
    if (!ptx::barrier_any(1 + group, kGroupThreads, least < kSmallestDecay<Elem>)) {
      const bool upper = span >= kSpans / 2;
      const float D[2] = {upper ? halves[1][0] : halves[0][0], upper ? halves[1][1] : halves[0][1]};
      middle(d, slot, e, span_decay, D);
      return;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) d[r] = 0.f;
    level<1>(d, slot, e, span_decay);
    level<2>(d, slot, e, span_decay);
    level<4>(d, slot, e, span_decay);
    level<8>(d, slot, e, span_decay);
  }
};

template <class Cfg>
struct Steep {
  float e[ProducerLane<Cfg>::kSpan][2];
  float span_decay[ProducerLane<Cfg>::kSpans][2];
};

struct Quarter {
  float d[4];
};

// Not inlined: its registers would be spilled around the path that most chunks take.
template <class Cfg>
__device__ __noinline__ Quarter multiply_steep(ProducerLane<Cfg> at, Slot<Cfg>* slot,
                                               Steep<Cfg> steep) {
  Quarter x;
  at.multiply_steep(x.d, slot, steep.e, steep.span_decay);
  return x;
}

// What comes from q, k and beta alone, token by token: norms, diagonals, beta.
template <class Cfg>
class Tokens {
  using Elem = typename Cfg::Elem;
  static constexpr int K = Cfg::K;
  // fp16 has no range to spare for q and k of any size times a decay: their norms come first, not
  // last.
  static constexpr bool kNarrow = std::is_same_v<Elem, __half>;

 public:
  __device__ Tokens(const Problem& p, const Work& w)
      : p_(p),
        w_(w),
        first_beta_(w.row * p.beta.stride_b + w.begin * p.beta.stride_t + w.hv * p.beta.stride_h) {}

  // Of one part of four: the diagonals of q and k times k (parts 0, 1) or of q times q (parts 2,
  // 3), of eight tokens each, from the raw tiles on the tensor cores: exact products and fp32 sums.
  __device__ __forceinline__ void store_dots(Slot<Cfg>* slot, int part, int lane) const {
    const int first = part % 2 * 8;
    const bool by_k = part < 2;
    const LanePosition at_b = by_piece(lane);
    // Rows 0-7 of the left operand are q's tokens and rows 8-15 k's.
    const char* left = reinterpret_cast<const char*>(lane & 8 ? slot->k : slot->q);
    const char* right = reinterpret_cast<const char*>(by_k ? slot->k : slot->q);
    float d[4] = {}, odd[4] = {};
#pragma unroll
    for (int kk = 0; kk < K / 16; kk += 2) {
      uint32_t a0[4], a1[4], b[4];
      ldmatrix(a0, left + tile_offset<K>(first + lane % 8, 2 * kk + lane / 16));
      ldmatrix(a1, left + tile_offset<K>(first + lane % 8, 2 * kk + 2 + lane / 16));
      ldmatrix(b, right + tile_offset<K>(first + at_b.row, 2 * kk + at_b.piece));
      mma<Elem>(d, a0, b[0], b[1]);
      mma<Elem>(odd, a1, b[2], b[3]);
    }
    if (lane % 4 != lane / 8) return;  // the others have no diagonal element
    const int t = first + lane / 4, i = lane / 4 % 2;
    const float of_q = i == 0 ? d[0] + odd[0] : d[1] + odd[1];
    const float of_k = i == 0 ? d[2] + odd[2] : d[3] + odd[3];
    const float norm = p_.l2norm ? ptx::rsqrt((by_k ? of_k : of_q) + 1e-6f) : 1.f;
    const float left_over = kNarrow ? 1.f : norm;
    if constexpr (kNarrow) (by_k ? slot->norm_k : slot->norm_q)[t] = norm;
    if (by_k) {
      slot->M_diagonal[t] = of_q;
      slot->rk[t] = left_over;
    } else {
      slot->rq[t] = p_.scale * left_over;
    }
  }

  // The bits of token lane's beta. Nothing waits for them before store_beta.
  __device__ __forceinline__ uint32_t load_beta(int64_t chunk, int lane) const {
    const int64_t t = chunk * kChunk + lane;
    if (lane >= kChunk || t >= w_.tokens) return 0;
    return load_bits(p_.beta.ptr, first_beta_ + t * p_.beta.stride_t, p_.beta.dtype);
  }

  __device__ __forceinline__ void store_beta(Slot<Cfg>* slot, int rows, uint32_t bits,
                                             int lane) const {
    if (lane >= kChunk) return;
    const float beta = bits_to_float(bits, p_.beta.dtype);
    slot->beta[lane] = lane < rows ? fast_beta_activation(beta, p_.beta_mode) : 0.f;
  }

 private:
  const Problem& p_;
  const Work& w_;
  int64_t first_beta_;  // of the sequence
};

template <class Cfg>
class Producer {
  using Elem = typename Cfg::Elem;
  using Traits = ElementTraits<Elem>;
  using Lane = ProducerLane<Cfg>;
  static constexpr int K = Cfg::K;
  static constexpr int kLanes = Lane::kLanes;
  static constexpr int kSpans = Lane::kSpans;
  static constexpr int kSpan = Lane::kSpan;
  // fp16 has no range to spare for q and k of any size times a decay: their norms come first, not
  // last.
  static constexpr bool kNarrow = std::is_same_v<Elem, __half>;

 public:
  __device__ Producer(const Problem& p, const Work& w, const Ring& ring, char* smem, int group,
                      int warp, int lane)
      : loader_(p, w, warp, lane),
        tokens_(p, w),
        p_(p),
        w_(w),
        ring_(ring),
        smem_(smem),
        at_(group, warp, lane) {
    load_gate_constants();
  }

  __device__ void run() {
    for (int c = at_.group; c < min(ring_.ahead, w_.chunks); c += ring_.producers) {
      load(c, RingPosition(c));
    }
    RingPosition at(at_.group);
    int turn = 0;
    uint32_t next_beta = load_beta(at_.group);
    for (int c = at_.group; c < w_.chunks; c += ring_.producers) {
      // Addresses are cheaper to find again for every chunk than to keep: kept, they were spilled.
      at_.lane = ptx::opaque(at_.lane);
      at_.place = ptx::opaque(at_.place);
      at_.span = ptx::opaque(at_.span);
      if (c + ring_.ahead < w_.chunks) {
        RingPosition ahead = at;
        ahead.advance(ring_.ahead, ring_);
        load(c + ring_.ahead, ahead);
      }
      const uint32_t beta = next_beta;
      if (c + ring_.producers < w_.chunks) next_beta = load_beta(c + ring_.producers);
      make(c, at, turn, beta);
      turn = (turn + 1) % kGroupWarps;
      at.advance(ring_.producers, ring_);
    }
  }

 private:
  __device__ __forceinline__ void load(int chunk, const RingPosition& position) const {
    Barriers* barriers = barriers_at(smem_);
    ptx::mbarrier_wait_idle(&barriers->empty[position.slot], position.parity ^ 1);
    loader_.load(slot_at<Cfg>(smem_, position.slot), chunk, &barriers->raw[position.slot]);
  }

  // For the warp that stores it.
  __device__ __forceinline__ uint32_t load_beta(int chunk) const {
    return Cfg::kHelpers > 0 || at_.warp != 0 ? 0 : tokens_.load_beta(chunk, at_.lane);
  }

  __device__ __forceinline__ void load_gate_constants() {
    const float exp_A = p_.A_log == nullptr ? 1.f : ptx::ex2(kLog2E * __ldg(p_.A_log + w_.hv));
    slope_ = kLog2E;
    factor_ = 1.f;
    if (p_.gate == Gate::kBounded) {
      slope_ = -kLog2E * exp_A;
      factor_ = kLog2E * p_.lower_bound;
    } else if (p_.gate == Gate::kSoftplus) {
      factor_ = -exp_A;
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int64_t i = int64_t{w_.hv} * K + at_.channel + c;
      shift_[c] = p_.dt_bias == nullptr ? 0.f : slope_ * __ldg(p_.dt_bias + i);
    }
  }

  // exp(g) of the gate's input x.
  template <Gate kGate>
  __device__ __forceinline__ float activate(float x, int c) const {
    const float y = slope_ * x + shift_[c];
    if constexpr (kGate == Gate::kBounded) {
      return ptx::ex2(factor_ * ptx::rcp(1.f + ptx::ex2(y)));
    } else if constexpr (kGate == Gate::kSoftplus) {
      return ptx::ex2(factor_ * log2_one_plus_exp2(y));
    } else {
      return ptx::ex2(y);
    }
  }

  template <class G>
  __device__ __forceinline__ void load_gate(float (&x)[kSpan][2], const char* g) const {
    const G* row = reinterpret_cast<const G*>(g) + at_.span * kSpan * K + at_.channel;
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      float2 y;
      if constexpr (sizeof(G) == 4) {
        y = *reinterpret_cast<const float2*>(row + i * K);
      } else {
        y = ElementTraits<G>::unpack(*reinterpret_cast<const uint32_t*>(row + i * K));
      }
      x[i][0] = y.x;
      x[i][1] = y.y;
    }
  }

  template <Gate kGate>
  __device__ __forceinline__ void activate_all(float (&e)[kSpan][2]) const {
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      e[i][0] = activate<kGate>(e[i][0], 0);
      e[i][1] = activate<kGate>(e[i][1], 1);
    }
  }

  // e = exp(g), 1 past the sequence's end.
  __device__ __forceinline__ void load_decays(float (&e)[kSpan][2], const char* g, int rows) const {
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

  // The lane's own channels of k and q over their norms, in place, and the products of q and k.
  __device__ __forceinline__ void normalise(Slot<Cfg>* slot) const {
    if (at_.warp == 0 && at_.lane < kChunk) {
      slot->M_diagonal[at_.lane] *= slot->norm_k[at_.lane] * slot->norm_q[at_.lane];
    }
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      const float rk = slot->norm_k[at_.span * kSpan + i];
      const float rq = slot->norm_q[at_.span * kSpan + i];
      *at_.at(slot->k, i) = Lane::scaled(*at_.at(slot->k, i), rk, rk);
      *at_.at(slot->q, i) = Lane::scaled(*at_.at(slot->q, i), rq, rq);
    }
  }

  // k_bar, k_tilde, q_bar and, unless the gate is steep, k / exp(G).
  template <bool kSteep>
  __device__ __forceinline__ void make_factors(Slot<Cfg>* slot, const float (&e)[kSpan][2],
                                               const float (&before)[2], const float (&after)[2],
                                               const float (&decay)[2]) const {
    // All loads come before any store: the compiler does not move a load over a store that may
    // alias it.
    uint32_t k[kSpan], q[kSpan];
#pragma unroll
    for (int i = 0; i < kSpan; ++i) {
      k[i] = *at_.at(slot->k, i);
      q[i] = *at_.at(slot->q, i);
    }
    float x0 = after[0], x1 = after[1];
    const float inverse0 = ptx::rcp(decay[0]), inverse1 = ptx::rcp(decay[1]);
#pragma unroll
    for (int i = kSpan - 1; i >= 0; --i) {
      const float2 y = Traits::unpack(k[i]);
      const float k0 = y.x * x0, k1 = y.y * x1;
      *at_.at(slot->k_tilde, i) = Traits::pack(k0, k1);
      if constexpr (!kSteep) *at_.at(slot->k, i) = Traits::pack(k0 * inverse0, k1 * inverse1);
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

  // A with beta and the norms, and M as the chain reads it, both strictly lower.
  __device__ __forceinline__ void store_products(Slot<Cfg>* slot, const float (&d)[4]) const {
    if (at_.warp == 3 && at_.lane < kChunk) {
      slot->T_diagonal[at_.lane] = slot->rk[at_.lane] * slot->beta[at_.lane];
    }
    const int j = at_.fragment_column(0);
    const float rk0 = slot->rk[j], rk1 = slot->rk[j + 1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = at_.fragment_row(2 * half);
      const float d0 = d[2 * half], d1 = d[2 * half + 1];
      if (at_.warp < 2) {
        const float factor = slot->beta[i] * slot->rk[i];
        slot->A[j * kAStride + i] = j < i ? d0 * factor * rk0 : 0.f;
        slot->A[(j + 1) * kAStride + i] = j + 1 < i ? d1 * factor * rk1 : 0.f;
      } else {
        *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(slot->M) +
                                     square_offset(i, at_.warp % 2) + (at_.lane % 4) * 4) =
            Traits::pack(j < i ? d0 : 0.f, j + 1 < i ? d1 : 0.f);
      }
    }
  }

  __device__ __forceinline__ void make(int chunk, const RingPosition& position, int turn,
                                       uint32_t beta) const {
    Slot<Cfg>* slot = slot_at<Cfg>(smem_, position.slot);
    Barriers* barriers = barriers_at(smem_);
    const int rows = static_cast<int>(min(w_.tokens - int64_t{chunk} * kChunk, int64_t{kChunk}));
    ptx::mbarrier_wait_idle(&barriers->empty[position.slot], position.parity ^ 1);
    ptx::mbarrier_wait_idle(&barriers->raw[position.slot], position.parity);

    if constexpr (Cfg::kHelpers == 0) {
      tokens_.store_dots(slot, at_.warp, ptx::opaque_lane(at_.lane));
      if (at_.warp == 0) tokens_.store_beta(slot, rows, beta, at_.lane);
    }
    float e[kSpan][2];
    load_decays(e, slot->g, rows);
    float span_decay[kSpans][2], before[2], after[2], decay[2];
    bool steep = false;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float own = 1.f;
#pragma unroll
      for (int i = 0; i < kSpan; ++i) own *= e[i][c];
      before[c] = after[c] = decay[c] = 1.f;
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        span_decay[s][c] = __shfl_sync(kFullWarp, own, s * kLanes + at_.lane % kLanes);
        decay[c] *= span_decay[s][c];
        before[c] *= s < at_.span ? span_decay[s][c] : 1.f;
        after[c] *= s > at_.span ? span_decay[s][c] : 1.f;
      }
      steep |= decay[c] < kSmallestDecay<Elem>;
    }
    if (at_.span == 0) {
      *reinterpret_cast<float2*>(slot->decay + at_.channel) = make_float2(decay[0], decay[1]);
    }
    // From here on the places of k, q and g may be written.
    if constexpr (Cfg::kHelpers > 0) {
      ptx::mbarrier_wait(&barriers->tokens[position.slot], position.parity);
    }
    steep = ptx::barrier_any(1 + at_.group, kGroupThreads, steep);
    if constexpr (kNarrow) {
      if (p_.l2norm) normalise(slot);
    }
    float d[4];
    if (steep) {
      Steep<Cfg> copy;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) copy.e[i][c] = e[i][c];
#pragma unroll
        for (int s = 0; s < kSpans; ++s) copy.span_decay[s][c] = span_decay[s][c];
      }
      const Quarter x = multiply_steep<Cfg>(at_, slot, copy);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] = x.d[i];
      make_factors<true>(slot, e, before, after, decay);
    } else {
      make_factors<false>(slot, e, before, after, decay);
      at_.sync();
      at_.multiply(d, slot->k_bar, slot->q, slot->k);
    }
    store_products(slot, d);
    if constexpr (Cfg::kHelpers > 0) {
      ptx::mbarrier_arrive(&barriers->triangle[position.slot]);
    } else {
      at_.sync();
      // The warps take turns, and the other three go on to the next chunk.
      if (at_.warp == turn) invert_triangle(slot->T, slot->A, slot->rk, slot->beta, at_.lane);
    }
    ptx::mbarrier_arrive(&barriers->full[position.slot]);
  }

  Loader<Cfg> loader_;
  Tokens<Cfg> tokens_;
  const Problem& p_;
  const Work& w_;
  const Ring& ring_;
  char* smem_;
  Lane at_;
  float shift_[2];
  float slope_, factor_;
};

// A warp of its own for what comes from q, k and beta alone, chunk by chunk.
template <class Cfg>
__device__ __forceinline__ void make_tokens(const Problem& p, const Work& w, const Ring& ring,
                                            char* smem, int lane) {
  const Tokens<Cfg> tokens(p, w);
  Barriers* barriers = barriers_at(smem);
  RingPosition at(0);
  uint32_t next_beta = tokens.load_beta(0, lane);
#pragma unroll 1
  for (int c = 0; c < w.chunks; ++c) {
    Slot<Cfg>* slot = slot_at<Cfg>(smem, at.slot);
    const uint32_t beta = next_beta;
    next_beta = tokens.load_beta(c + 1, lane);
    const int rows = static_cast<int>(min(w.tokens - int64_t{c} * kChunk, int64_t{kChunk}));
    ptx::mbarrier_wait_idle(&barriers->raw[at.slot], at.parity);
#pragma unroll
    for (int part = 0; part < 4; ++part) tokens.store_dots(slot, part, lane);
    tokens.store_beta(slot, rows, beta, lane);
    ptx::mbarrier_arrive(&barriers->tokens[at.slot]);
    at.advance(1, ring);
  }
}

// A warp of its own for the producers' triangles, chunk by chunk.
template <class Cfg>
__device__ __forceinline__ void invert_triangles(const Work& w, const Ring& ring, char* smem,
                                                 int lane) {
  Barriers* barriers = barriers_at(smem);
  RingPosition at(0);
#pragma unroll 1
  for (int c = 0; c < w.chunks; ++c) {
    Slot<Cfg>* slot = slot_at<Cfg>(smem, at.slot);
    ptx::mbarrier_wait_idle(&barriers->triangle[at.slot], at.parity);
    invert_triangle(slot->T, slot->A, slot->rk, slot->beta, lane);
    ptx::mbarrier_arrive(&barriers->full[at.slot]);
    at.advance(1, ring);
  }
}

}  // namespace flashkda::cuda::sm80::prefill
