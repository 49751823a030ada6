// The square warps: each, a chunk at a time, makes the 16 x 16 matrices T and M from the factors and
// the norms of q and k, which come from products of the raw tiles on the tensor cores: exact
// products of bf16 and fp32 sums. The diagonals, which weigh most where decay is fast, never see
// rounded factors.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../../common/gate.cuh"
#include "../../common/triangle.cuh"
#include "../ptx.cuh"
#include "shared.cuh"
#include "tile.cuh"
#include "work.cuh"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
class SquareWarp {
  using Elem = __nv_bfloat16;
  using Traits = ElementTraits<Elem>;

  // A 16 x 16 accumulator: columns 0-7 and 8-15. Element i of a half is row row(i), column
  // column(half, i).
  using Square = float[2][4];

 public:
  __device__ SquareWarp(const Problem& p, const Work& w, Shared<Cfg>& s, int warp, int lane)
      : p_(p), w_(w), s_(s), warp_(warp), lane_(lane) {}

  __device__ void run() {
    Cursor<kRaw> raw(warp_);
    Cursor<kSlots> slot(warp_);
    uint32_t next_beta = load_beta(warp_);
    for (int c = warp_; c < w_.chunks; c += kSquareWarps) {
      // Addresses are cheaper to find again for every chunk than to keep.
      lane_ = ptx::opaque(lane_);
      const uint32_t beta = next_beta;
      if (c + kSquareWarps < w_.chunks) next_beta = load_beta(c + kSquareWarps);
      make(c, raw, slot, beta);
      raw.advance(kSquareWarps);
      slot.advance(kSquareWarps);
    }
  }

 private:
  __device__ __forceinline__ int row(int i) const { return lane_ / 4 + (i / 2) * 8; }
  __device__ __forceinline__ int column(int half, int i) const {
    return half * 8 + (lane_ % 4) * 2 + (i & 1);
  }

  // The bits of token lane's beta. Nothing waits for them before the next chunk.
  __device__ __forceinline__ uint32_t load_beta(int64_t chunk) const {
    const int64_t t = chunk * kChunk + lane_;
    if (lane_ >= kChunk || t >= w_.tokens) return 0;
    const int64_t i =
        w_.row * p_.beta.stride_b + (w_.begin + t) * p_.beta.stride_t + w_.hv * p_.beta.stride_h;
    return load_bits(p_.beta.ptr, i, p_.beta.dtype);
  }

  // Rows of a tile as the left operand; transposed, the same registers are the right one.
  template <int kRows>
  __device__ __forceinline__ void load(uint32_t (&x)[4], const void* tile, int first_row,
                                       int kk) const {
    const LanePosition at = by_row(lane_);
    ldmatrix(x, static_cast<const char*>(tile) +
                    halves_offset<kRows>(first_row + at.row, 2 * kk + at.piece));
  }

  // d += a b^T for 16 rows of a and of b.
  static __device__ __forceinline__ void multiply(Square& d, const uint32_t (&a)[4],
                                                  const uint32_t (&b)[4]) {
    mma<Elem>(d[0], a, b[0], b[2]);
    mma<Elem>(d[1], a, b[1], b[3]);
  }

  // In lanes with lane % 4 == lane / 8: the diagonal's elements lane / 4 and lane / 4 + 8.
  __device__ __forceinline__ float2 diagonal(const Square& d) const {
    const bool odd = lane_ & 4;
    return {odd ? d[0][1] : d[0][0], odd ? d[1][3] : d[1][2]};
  }

  __device__ __forceinline__ void plain_products(Square& A, Square& M, const Factors& f) const {
#pragma unroll
    for (int kk = 0; kk < kChannels / 16; ++kk) {
      uint32_t k_bar[4], q_bar[4], k_hat[4];
      load<2 * kChunk>(k_bar, f.bars, 0, kk);
      load<2 * kChunk>(q_bar, f.bars, kChunk, kk);
      load<kChunk>(k_hat, f.k_hat, 0, kk);
      multiply(A, k_bar, k_hat);
      multiply(M, q_bar, k_hat);
    }
  }

  template <class G>
  __device__ __forceinline__ float4 load_gate(const char* g, int t) const {
    const G* x = reinterpret_cast<const G*>(g) + t * kChannels + 4 * lane_;
    if constexpr (sizeof(G) == 4) {
      return *reinterpret_cast<const float4*>(x);
    } else {
      const uint2 bits = *reinterpret_cast<const uint2*>(x);
      const float2 low = ElementTraits<G>::unpack(bits.x), high = ElementTraits<G>::unpack(bits.y);
      return {low.x, low.y, high.x, high.y};
    }
  }

  template <Gate kGate>
  static __device__ __forceinline__ float4 activate(float4 x, const DecayParams& params,
                                                    float4 shift) {
    return {decay_of<kGate>(x.x, params, shift.x), decay_of<kGate>(x.y, params, shift.y),
            decay_of<kGate>(x.z, params, shift.z), decay_of<kGate>(x.w, params, shift.w)};
  }

  // Turns g into exp(g) in fp32 where it lies. Row t takes the place of 16-bit rows 2 t and 2 t + 1:
  // descending, they have been read.
  __device__ __forceinline__ void decays_in_place(char* g, int rows) const {
    const DecayParams params = load_decay_params(p_, w_.hv);
    const float4 shift = {
        load_shift(p_, params, w_.hv, 4 * lane_), load_shift(p_, params, w_.hv, 4 * lane_ + 1),
        load_shift(p_, params, w_.hv, 4 * lane_ + 2), load_shift(p_, params, w_.hv, 4 * lane_ + 3)};
#pragma unroll 1
    for (int t = kChunk - 1; t >= 0; --t) {
      float4 x = p_.g.dtype == DType::kF32    ? load_gate<float>(g, t)
                 : p_.g.dtype == DType::kBF16 ? load_gate<__nv_bfloat16>(g, t)
                                              : load_gate<__half>(g, t);
      if (p_.gate == Gate::kBounded) {
        x = activate<Gate::kBounded>(x, params, shift);
      } else if (p_.gate == Gate::kSoftplus) {
        x = activate<Gate::kSoftplus>(x, params, shift);
      } else {
        x = activate<Gate::kGiven>(x, params, shift);
      }
      if (t >= rows) x = {1.f, 1.f, 1.f, 1.f};
      __syncwarp();
      *(reinterpret_cast<float4*>(g + t * kChannels * 4) + lane_) = x;
    }
    __syncwarp();
  }

  // A and M for any gate: at level `half`, tokens in the upper half of a block of 2 half tokens meet
  // those in its lower half, with the decay split at the middle of the block, so that both parts are
  // products of numbers <= 1.
  __device__ __forceinline__ void steep_products(Square& A, Square& M, Raw& raw, int rows) const {
    decays_in_place(raw.g, rows);
#pragma unroll 1
    for (int half = 1; half < kChunk; half *= 2) {
      Square level_A = {}, level_M = {};
#pragma unroll 1
      for (int kk = 0; kk < kChannels / 16; ++kk) {
        uint32_t k[4], q[4];
        load<kChunk>(k, raw.k, 0, kk);
        load<kChunk>(q, raw.q, 0, kk);
        // Element [r][c] is token lane / 4 + 8 r, channels 16 kk + 2 (lane % 4) + {0, 1, 8, 9}.
        float before[2][4], after[2][4], block[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* e = reinterpret_cast<const float*>(raw.g) +
                           (lane_ / 4 + 8 * r) * kChannels + 16 * kk + 2 * (lane_ % 4);
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            before[r][c] = block[r][c] = e[(c / 2) * 8 + (c & 1)];
            after[r][c] = 1.f;
          }
        }
        // Over blocks of growing size: the product up to the token, after it, and of the block.
#pragma unroll 1
        for (int size = 1; size < half; size *= 2) {
          const bool upper = lane_ & (4 * size);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float other = __shfl_xor_sync(~0u, block[r][c], 4 * size);
              if (upper) {
                before[r][c] *= other;
              } else {
                after[r][c] *= other;
              }
              block[r][c] *= other;
            }
          }
        }
        uint32_t k_split[4], q_split[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = i & 1, c = (i / 2) * 2;
          const bool upper = (lane_ / 4 + 8 * r) & half;
          const bool inside = lane_ / 4 + 8 * r < rows;
          const float f0 = upper ? before[r][c] : after[r][c];
          const float f1 = upper ? before[r][c + 1] : after[r][c + 1];
          const float2 ki = Traits::unpack(inside ? k[i] : 0), qi = Traits::unpack(inside ? q[i] : 0);
          k_split[i] = Traits::pack(ki.x * f0, ki.y * f1);
          q_split[i] = Traits::pack(qi.x * f0, qi.y * f1);
        }
        multiply(level_A, k_split, k_split);
        multiply(level_M, q_split, k_split);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int t = row(i), j = column(h, i);
          if (t / (2 * half) == j / (2 * half) && (t & half) && !(j & half)) {
            A[h][i] = level_A[h][i];
            M[h][i] = level_M[h][i];
          }
        }
      }
    }
  }

  __device__ __forceinline__ void make(int chunk, const Cursor<kRaw>& raw_at,
                                       const Cursor<kSlots>& slot, uint32_t beta_bits) const {
    Raw& raw = s_.raw[raw_at.at];
    const Factors& factors = s_.factors[slot.at];
    Squares& to = s_.squares[slot.at];
    Scratch& scratch = s_.scratch[warp_];
    const int rows = static_cast<int>(min(w_.tokens - int64_t{chunk} * kChunk, int64_t{kChunk}));

    ptx::mbarrier_wait_suspended(&s_.raw_full[raw_at.at], raw_at.parity);
    Square kk = {}, qq = {}, qk = {};
#pragma unroll
    for (int i = 0; i < kChannels / 16; ++i) {
      uint32_t k[4], q[4];
      load<kChunk>(k, raw.k, 0, i);
      load<kChunk>(q, raw.q, 0, i);
      multiply(kk, k, k);
      multiply(qq, q, q);
      multiply(qk, q, k);
    }
    const float2 k_square = diagonal(kk), q_square = diagonal(qq), q_k = diagonal(qk);

    ptx::mbarrier_wait_suspended(&s_.factors_full[slot.at], slot.parity);
    if (lane_ % 4 == lane_ / 8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int t = lane_ / 4 + 8 * i;
        const bool inside = t < rows;
        float rk = 1.f, rq = 1.f;
        if (p_.l2norm) {
          rk = rsqrtf((i == 0 ? k_square.x : k_square.y) + 1e-6f);
          rq = rsqrtf((i == 0 ? q_square.x : q_square.y) + 1e-6f);
        }
        to.rk[t] = inside ? rk : 0.f;
        to.rq[t] = inside ? p_.scale * rq : 0.f;
        to.M_diagonal[t] = inside ? (i == 0 ? q_k.x : q_k.y) : 0.f;
      }
    }
    float beta = bits_to_float(__shfl_sync(~0u, beta_bits, lane_ % kChunk), p_.beta.dtype);
    beta = lane_ % kChunk < rows ? beta_activation(beta, p_.beta_mode) : 0.f;
    if (lane_ < kChunk) scratch.beta[lane_] = beta;
    __syncwarp();

    Square A = {}, M = {};
    if (to.steep[0] | to.steep[1]) {
      steep_products(A, M, raw, rows);
    } else {
      plain_products(A, M, factors);
    }
    ptx::mbarrier_arrive(&s_.raw_empty[raw_at.at]);

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = column(h, 0);
      const float rk0 = to.rk[j], rk1 = to.rk[j + 1];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = row(2 * r);
        const float factor = scratch.beta[i] * to.rk[i];
        scratch.A[j * kTriangleStride + i] = j < i ? A[h][2 * r] * factor * rk0 : 0.f;
        scratch.A[(j + 1) * kTriangleStride + i] =
            j + 1 < i ? A[h][2 * r + 1] * factor * rk1 : 0.f;
        *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(to.M) + square_offset(i, h) +
                                     (lane_ % 4) * 4) =
            Traits::pack(j < i ? M[h][2 * r] : 0.f, j + 1 < i ? M[h][2 * r + 1] : 0.f);
      }
    }
    __syncwarp();
    invert_triangle(to.T, to.T_diagonal, scratch.A, to.rk, beta, lane_);
    ptx::mbarrier_arrive(&s_.full[slot.at]);
  }

  const Problem& p_;
  const Work& w_;
  Shared<Cfg>& s_;
  int warp_, lane_;
};

}  // namespace flashkda::cuda::sm90::prefill
