// The helpers: what a chunk needs that is no work on whole tiles of channels, a warp every second
// chunk. From the raw tokens, before a producer overwrites them: norms, diagonals, beta. From the
// producer's factors: the squares A and M, and T.
#pragma once

#include <type_traits>

#include "../../common/convert.cuh"
#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../../common/ptx.cuh"
#include "../../common/tile.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

// fp16 has no range to spare for q and k of any size times a decay: their norms come first, not
// last.
template <class Elem>
inline constexpr bool kNarrow = std::is_same_v<Elem, __half>;

// A quarter of A with beta and the norms, or of M as the chain reads it, both strictly lower:
// quarters 0 and 1 are A's columns 0-7 and 8-15, 2 and 3 are M's. It is made from a product's
// accumulators. All that it loads is there before a quarter is stored: the compiler does not move a
// load over a store that may alias it.
template <class Cfg>
struct QuarterFactors {
  float row[2];      // rk beta of the lane's rows, lane / 4 and 8 + lane / 4
  float2 column[2];  // rk of its two columns, of A's left half and of its right half

  __device__ __forceinline__ QuarterFactors(const Slot<Cfg>* slot, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = slot->T_diagonal[paired(half * 8 + lane / 4)];
      column[half] = *reinterpret_cast<const float2*>(slot->rk + half * 8 + lane % 4 * 2);
    }
  }

  __device__ __forceinline__ void store(Slot<Cfg>* slot, int quarter, int lane,
                                        const float (&d)[4]) const {
    const int right = quarter % 2, j = right * 8 + lane % 4 * 2;
    const float2 rk = right ? column[1] : column[0];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = half * 8 + lane / 4;
      const float d0 = d[2 * half], d1 = d[2 * half + 1];
      if (quarter < 2) {
        if (half < right) continue;  // nothing reads the block above A's diagonal
        slot->A[j * kAStride + i] = j < i ? d0 * row[half] * rk.x : 0.f;
        slot->A[(j + 1) * kAStride + i] = j + 1 < i ? d1 * row[half] * rk.y : 0.f;
      } else {
        *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(slot->M) + square_offset(i, right) +
                                     lane % 4 * 4) =
            ElementTraits<typename Cfg::Elem>::pack(j < i ? d0 : 0.f, j + 1 < i ? d1 : 0.f);
      }
    }
  }
};

template <class Cfg>
class Helper {
  using Elem = typename Cfg::Elem;
  static constexpr int K = Cfg::K;

 public:
  __device__ Helper(const Problem& p, const Work& w, int slots, char* smem, int rank, int lane)
      : p_(p),
        w_(w),
        slots_(slots),
        smem_(smem),
        rank_(rank),
        lane_(lane),
        first_beta_(w.row * p.beta.stride_b + w.begin * p.beta.stride_t + w.hv * p.beta.stride_h) {}

  // A chunk's tokens come before the squares of the helper's chunk before it, so that a producer
  // never waits for them; but in a short ring squares would wait for a chunk's loads.
  __device__ void run() {
    const int lead = slots_ > kShortRing ? kHelpers : 0;
    RingPosition ahead(rank_), at(rank_);
    next_beta_ = load_beta(rank_);
#pragma unroll 1
    for (int c = rank_; c < w_.chunks + lead; c += kHelpers) {
      if (c < w_.chunks) {
        make_tokens(c, ahead);
        ahead.advance(kHelpers, slots_);
      }
      if (c >= lead) {
        make_squares(at);
        at.advance(kHelpers, slots_);
      }
    }
  }

 private:
  // The bits of token lane's beta. Nothing waits for them before make_tokens.
  __device__ __forceinline__ uint32_t load_beta(int chunk) const {
    const int64_t t = int64_t{chunk} * Cfg::kStep + lane_;
    if (lane_ >= kChunk || t >= w_.tokens) return 0;
    return load_bits(p_.beta.ptr, first_beta_ + t * p_.beta.stride_t, p_.beta.dtype);
  }

  __device__ __forceinline__ void make_tokens(int chunk, const RingPosition& at) {
    Slot<Cfg>* slot = slot_at<Cfg>(smem_, at.slot);
    Barriers* barriers = barriers_at(smem_);
    const uint32_t bits = next_beta_;
    next_beta_ = load_beta(chunk + kHelpers);
    float beta = fast_beta_activation(bits_to_float(bits, p_.beta.dtype), p_.beta_mode);
    if (int64_t{chunk} * Cfg::kStep + lane_ >= w_.tokens) beta = 0.f;
    ptx::mbarrier_wait_idle(&barriers->raw[at.slot], at.parity);
    if (lane_ < kChunk) slot->beta[lane_] = beta;
    store_dots(slot, beta);
    ptx::mbarrier_arrive(&barriers->tokens[at.slot]);
  }

  // The products of each token's q and k, k and k, q and q, from the raw tiles on the tensor cores:
  // exact products and fp32 sums. Eight tokens, a half, at a time.
  __device__ __forceinline__ void store_dots(Slot<Cfg>* slot, float beta) const {
    const int lane = ptx::opaque_lane(lane_);
    // Rows 0-7 of the left operand are q's tokens and rows 8-15 k's; either half of its registers
    // is a right operand too.
    const uint32_t left = ptx::smem_address(lane & 8 ? slot->k : slot->q);
    uint32_t a[2][K / 16][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = left + tile_offset<K>(half * 8 + lane % 8, lane / 16);
#pragma unroll
      for (int kk = 0; kk < K / 16; ++kk) ldmatrix(a[half][kk], pieces_on(at, kk));
    }
    float by_q[2][2][4] = {}, by_k[2][2][4] = {};
#pragma unroll
    for (int kk = 0; kk < K / 16; ++kk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t (&x)[4] = a[half][kk];
        mma<Elem>(by_q[half][kk % 2], x, x[0], x[2]);
        mma<Elem>(by_k[half][kk % 2], x, x[1], x[3]);
      }
    }
    float beta_t[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      beta_t[half] = __shfl_sync(0xffffffffu, beta, half * 8 + lane / 4);
    }
    if (lane % 4 != lane / 8) return;  // the others have no diagonal element
    const bool odd = lane & 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = half * 8 + lane / 4;
      const auto sum = [&](const float (&x)[2][4], int row) {
        return odd ? x[0][row + 1] + x[1][row + 1] : x[0][row] + x[1][row];
      };
      const float qq = sum(by_q[half], 0), qk = sum(by_k[half], 0), kk = sum(by_k[half], 2);
      const float norm_q = p_.l2norm ? ptx::rsqrt(qq + 1e-6f) : 1.f;
      const float norm_k = p_.l2norm ? ptx::rsqrt(kk + 1e-6f) : 1.f;
      const float rk = kNarrow<Elem> ? 1.f : norm_k;
      if constexpr (kNarrow<Elem>) {
        slot->norm_q[t] = norm_q;
        slot->norm_k[t] = norm_k;
      }
      slot->rq[paired(t)] = p_.scale * (kNarrow<Elem> ? 1.f : norm_q);
      slot->rk[t] = rk;
      slot->M_diagonal[paired(t)] = kNarrow<Elem> ? qk * (norm_k * norm_q) : qk;
      slot->T_diagonal[paired(t)] = rk * beta_t[half];
    }
  }

  __device__ __forceinline__ void make_squares(const RingPosition& at) const {
    Slot<Cfg>* slot = slot_at<Cfg>(smem_, at.slot);
    Barriers* barriers = barriers_at(smem_);
    const int lane = ptx::opaque_lane(lane_);
    ptx::mbarrier_wait_idle(&barriers->factors[at.slot], at.parity);
    if (slot->reference != Reference::kSplits) multiply(slot, lane);
    __syncwarp();
    invert(slot, lane);
    ptx::mbarrier_arrive(&barriers->full[at.slot]);
  }

  // T by forward substitution. A lane has a column, all of it: no lane waits for another.
  __device__ __forceinline__ void invert(Slot<Cfg>* slot, int lane) const {
    const int column = lane % kChunk;
    float x[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = i == column ? 1.f : 0.f;
#pragma unroll
    for (int j = 0; j < kChunk - 1; ++j) {
#pragma unroll
      for (int first = (j + 1) / 4 * 4; first < kChunk; first += 4) {
        const float4 y = *reinterpret_cast<const float4*>(slot->A + j * kAStride + first);
        const float a[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first + i > j) x[first + i] -= a[i] * x[j];
        }
      }
    }
    // Either half of the lanes has all columns, and stores half of their rows.
    const int upper = lane / kChunk;
    const float beta = slot->beta[column];
    float rk[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; i += 4) {
      const float4 y = *reinterpret_cast<const float4*>(slot->rk + upper * (kChunk / 2) + i);
      rk[i] = y.x;
      rk[i + 1] = y.y;
      rk[i + 2] = y.z;
      rk[i + 3] = y.w;
    }
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const int row = upper * (kChunk / 2) + i;
      const float t = upper ? x[kChunk / 2 + i] : x[i];
      *reinterpret_cast<Elem*>(reinterpret_cast<char*>(slot->T) + square_offset(row, column / 8) +
                               column % 8 * sizeof(Elem)) =
          ElementTraits<Elem>::from_float(row == column ? 0.f : t * rk[i] * beta);
    }
  }

  // A and M: k_bar and q_bar times k enter / exp(G).
  __device__ __forceinline__ void multiply(Slot<Cfg>* slot, int lane) const {
    const QuarterFactors<Cfg> factors(slot, lane);
    const LanePosition rows = by_row(lane), columns = by_column(lane);
    const int offset = tile_offset<K>(rows.row, rows.piece);
    const uint32_t k_bar = ptx::smem_address(slot->k_bar) + offset;
    const uint32_t q_bar = ptx::smem_address(slot->q) + offset;
    const uint32_t k = ptx::smem_address(slot->k) + tile_offset<K>(columns.row, columns.piece);
    // Even and odd steps are summed apart: half the latency.
    float d[4][2][4] = {};
    uint32_t a[2][2][4], b[2][4];
    const auto load = [&](int kk) {
      ldmatrix(b[kk % 2], pieces_on(k, kk));
      ldmatrix(a[kk % 2][0], pieces_on(k_bar, kk));
      ldmatrix(a[kk % 2][1], pieces_on(q_bar, kk));
    };
    load(0);
#pragma unroll
    for (int kk = 0; kk < K / 16; ++kk) {
      if (kk + 1 < K / 16) load(kk + 1);
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        mma<Elem>(d[quarter][kk % 2], a[kk % 2][quarter / 2], b[kk % 2][quarter % 2 * 2],
                  b[kk % 2][quarter % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[quarter][0][i] += d[quarter][1][i];
      factors.store(slot, quarter, lane, d[quarter][0]);
    }
  }

  const Problem& p_;
  const Work& w_;
  int slots_;
  char* smem_;
  int rank_, lane_;
  int64_t first_beta_;  // of the sequence
  uint32_t next_beta_ = 0;
};

}  // namespace flashkda::cuda::sm80::prefill
