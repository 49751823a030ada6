// The square warps: each, a chunk at a time, makes the 16 x 16 matrices T and M from the factors
// and the norms of q and k, which come from products of the raw tiles on the tensor cores: exact
// products of bf16 and fp32 sums. The diagonals, which weigh most where decay is fast, never see
// rounded factors.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../../common/triangle.cuh"
#include "../ptx.cuh"
#include "loader.cuh"
#include "shared.cuh"
#include "tile.cuh"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
class SquareWarp {
  using Elem = __nv_bfloat16;
  using Traits = ElementTraits<Elem>;

  // A 16 x 16 accumulator: columns 0-7 and 8-15. Element i of a half is row row(i), column
  // column(half, i).
  using Square = float[2][4];

 public:
  __device__ SquareWarp(const Problem& p, const Maps& maps, const Work& w, Shared<Cfg>& s,
                        uint32_t base, int warp, int lane)
      : p_(p),
        w_(w),
        s_(s),
        loader_(p, maps, w, s, base),
        base_(base),
        warp_(warp),
        lane_(lane),
        rank_(w.v0 / Cfg::VS),
        tokens_(static_cast<int>(w.tokens)),
        chunks_(w.chunks),
        first_beta_(w.row * p.beta.stride_b + w.begin * p.beta.stride_t + w.hv * p.beta.stride_h) {}

  __device__ void run() {
    for (int turn = warp_; turn < kAhead && chunk_of(turn) < chunks_; turn += kSquareWarps) {
      loader_.load_raw(chunk_of(turn), turn);
    }
    Cursor<Cfg::kOwn> own(warp_);
    uint32_t raw_parity = 0;
    uint32_t next_beta = load_beta(chunk_of(warp_));
#pragma unroll 1
    for (int turn = warp_; turn * Cfg::kCluster < chunks_; turn += kSquareWarps) {
      // Addresses are cheaper to find again for every chunk than to keep.
      lane_ = ptx::opaque_lane(lane_);
      if (chunk_of(turn + kAhead) < chunks_) {
        loader_.load_raw(chunk_of(turn + kAhead), turn + kAhead);
      }
      loader_.load_values(turn, own);
      const uint32_t beta = next_beta;
      next_beta = load_beta(chunk_of(turn + kSquareWarps));
      if (chunk_of(turn) < chunks_) make(chunk_of(turn), raw_parity, own, beta);
      raw_parity ^= 1;
      own.advance(kSquareWarps);
    }
  }

 private:
  __device__ __forceinline__ uint32_t at(const void* part) const {
    return address_of(s_, base_, part);
  }

  // The block's own chunks.
  __device__ __forceinline__ int chunk_of(int turn) const { return turn * Cfg::kCluster + rank_; }

  __device__ __forceinline__ int row(int i) const { return lane_ / 4 + (i / 2) * 8; }
  __device__ __forceinline__ int column(int half, int i) const {
    return half * 8 + (lane_ % 4) * 2 + (i & 1);
  }

  // The bits of token lane's beta. Nothing waits for them before the next chunk.
  __device__ __forceinline__ uint32_t load_beta(int chunk) const {
    const int t = chunk * kChunk + lane_;
    if (lane_ >= kChunk || t >= tokens_) return 0;
    return load_bits(p_.beta.ptr, first_beta_ + t * p_.beta.stride_t, p_.beta.dtype);
  }

  // Where this lane's row of a 16 x 16 block of a half's first channels lies, for ldmatrix; of the
  // next block it lies at next(place, 1), and so on.
  __device__ __forceinline__ uint32_t block(const void* half, int first_row,
                                            const LanePosition& x) const {
    return at(half) + row_offset(first_row + x.row, x.piece);
  }
  static __device__ __forceinline__ uint32_t next(uint32_t place, int blocks) {
    return place ^ (blocks * 2 * kPiece);
  }

  // d += a b^T for 16 rows of a, loaded by row, and of b, loaded by column.
  static __device__ __forceinline__ void multiply(Square& d, const uint32_t (&a)[4],
                                                  const uint32_t (&b)[4]) {
    mma<Elem>(d[0], a, b[0], b[1]);
    mma<Elem>(d[1], a, b[2], b[3]);
  }

  __device__ __forceinline__ void plain_products(Square& A, Square& M, const Slot& f,
                                                 const Hat& hat) const {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const uint32_t k_place = block(f.bars[half], 0, by_row(lane_));
      const uint32_t q_place = block(f.bars[half], kChunk, by_row(lane_));
      const uint32_t hat_place = block(hat.k_hat[half], 0, by_column(lane_));
#pragma unroll
      for (int i = 0; i < kHalf / 16; ++i) {
        uint32_t k_bar[4], q_bar[4], k_hat[4];
        ptx::ldmatrix_at(k_bar, next(k_place, i));
        ptx::ldmatrix_at(q_bar, next(q_place, i));
        ptx::ldmatrix_at(k_hat, next(hat_place, i));
        multiply(A, k_bar, k_hat);
        multiply(M, q_bar, k_hat);
      }
    }
  }

  // Four channels of token t, 4 lane and on.
  template <class G>
  __device__ __forceinline__ float4 load_gate(const char* g, int t) const {
    if constexpr (sizeof(G) == 4) {
      return *(reinterpret_cast<const float4*>(g + t * kChannels * sizeof(float)) + lane_);
    } else {
      const char* half = g + lane_ / 16 * sizeof(Raw::k[0]);
      const uint2 bits =
          *reinterpret_cast<const uint2*>(half + row_offset(t, lane_ % 16 / 2) + lane_ % 2 * 8);
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

  // exp(g) in fp32, 128 channels a token: of tokens 0-7 to low, of tokens 8-15 to high.
  __device__ __forceinline__ void store_decays(char* low, char* high, const char* g,
                                               int rows) const {
    const DecayParams params = load_decay_params(p_, w_.hv);
    const float4 shift = {
        load_shift(p_, params, w_.hv, 4 * lane_), load_shift(p_, params, w_.hv, 4 * lane_ + 1),
        load_shift(p_, params, w_.hv, 4 * lane_ + 2), load_shift(p_, params, w_.hv, 4 * lane_ + 3)};
#pragma unroll 1
    for (int t = 0; t < kChunk; ++t) {
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
      char* to = (t < 8 ? low : high) + t % 8 * kChannels * sizeof(float);
      *(reinterpret_cast<float4*>(to) + lane_) = x;
    }
    __syncwarp();
  }

  // A and M for any gate: at level `half`, tokens in the upper half of a block of 2 half tokens
  // meet those in its lower half, with the decay split at the middle of the block, so that both
  // parts are products of numbers <= 1.
  __device__ __forceinline__ void steep_products(Square& A, Square& M, Raw& raw, Hat& hat,
                                                 int rows) const {
    // fp32 gates are replaced where they lie; others leave half of their room free, and k_hat's is.
    constexpr int kHalfBytes = sizeof(raw.g) / 2;
    char* low = p_.g.dtype == DType::kF32 ? raw.g : raw.g + kHalfBytes;
    char* high =
        p_.g.dtype == DType::kF32 ? raw.g + kHalfBytes : reinterpret_cast<char*>(hat.k_hat);
    store_decays(low, high, raw.g, rows);
#pragma unroll 1
    for (int half = 1; half < kChunk; half *= 2) {
      Square level_A = {}, level_M = {};
#pragma unroll 1
      for (int kk = 0; kk < kChannels / 16; ++kk) {
        uint32_t k[4], q[4];
        ptx::ldmatrix_at(k, next(block(raw.k[kk / 4], 0, by_row(lane_)), kk % 4));
        ptx::ldmatrix_at(q, next(block(raw.q[kk / 4], 0, by_row(lane_)), kk % 4));
        // Element [r][c] is token lane / 4 + 8 r, channels 16 kk + 2 (lane % 4) + {0, 1, 8, 9}.
        float before[2][4], after[2][4], block[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* e = reinterpret_cast<const float*>(r == 0 ? low : high) +
                           lane_ / 4 * kChannels + 16 * kk + 2 * (lane_ % 4);
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
          const float2 ki = Traits::unpack(inside ? k[i] : 0),
                       qi = Traits::unpack(inside ? q[i] : 0);
          k_split[i] = Traits::pack(ki.x * f0, ki.y * f1);
          q_split[i] = Traits::pack(qi.x * f0, qi.y * f1);
        }
        const uint32_t k_right[4] = {k_split[0], k_split[2], k_split[1], k_split[3]};
        multiply(level_A, k_split, k_right);
        multiply(level_M, q_split, k_right);
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

  // Tells the cluster's chains, after the other blocks have got their copy.
  __device__ __forceinline__ void hand_over(const Slot& slot, const uint64_t* full) const {
    if constexpr (Cfg::kCluster > 1) ptx::fence_async_proxy();
    __syncwarp();
    if (lane_ != 0) return;
    ptx::mbarrier_arrive_at(at(full));
    if constexpr (Cfg::kCluster > 1) {
      static_assert(Cfg::kCluster == 2);
      const uint32_t there = ptx::address_in(at(full), rank_ ^ 1);
      ptx::mbarrier_expect_in_cluster(there, kSlotBytes);
      ptx::copy_in_cluster(ptx::address_in(at(&slot), rank_ ^ 1), at(&slot), kSlotBytes, there);
    }
  }

  __device__ __forceinline__ void make(int chunk, uint32_t raw_parity, const Cursor<Cfg::kOwn>& own,
                                       uint32_t beta_bits) const {
    Raw& raw = s_.raw[warp_];
    const int slot = own.at * Cfg::kCluster + rank_;
    Slot& to = s_.slots[slot];
    Hat& hat = s_.hats[own.at];
    Scratch& scratch = s_.scratch[warp_];
    const int rows = min(tokens_ - chunk * kChunk, kChunk);

    ptx::mbarrier_wait_at(at(&s_.raw_full[warp_]), raw_parity);
    // Of eight tokens each: q and, below it, k times k; and times q.
    float by_k[2][4] = {}, by_q[2][4] = {};
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      // As left operand, lanes 0-7 and 16-23 load rows of q and the others of k; as right operand,
      // lanes 0-15 load rows of k and the others of q.
      const uint32_t k_half = at(raw.k[half]), q_half = at(raw.q[half]);
      const uint32_t left = (lane_ & 8 ? k_half : q_half) + row_offset(lane_ & 7, lane_ >> 4);
      const uint32_t right =
          (lane_ & 16 ? q_half : k_half) + row_offset(lane_ & 7, (lane_ >> 3) & 1);
#pragma unroll
      for (int i = 0; i < kHalf / 16; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t a[4], b[4];
          ptx::ldmatrix_at(a, next(left, i) + h * 8 * kRowBytes);
          ptx::ldmatrix_at(b, next(right, i) + h * 8 * kRowBytes);
          mma<Elem>(by_k[h], a, b[0], b[1]);
          mma<Elem>(by_q[h], a, b[2], b[3]);
        }
      }
    }
    ptx::mbarrier_wait_at(at(&s_.factors_full[own.at]), own.parity);
    const int4 flags = *reinterpret_cast<const int4*>(s_.steep[own.at]);
    const bool steep = flags.x | flags.y | flags.z | flags.w;
    if (!steep) ptx::mbarrier_arrive_at(at(&s_.raw_empty[warp_]));
    // The lanes that have the diagonals' elements lane / 4.
    if (lane_ % 4 == lane_ / 8) {
      const bool odd = lane_ & 4;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int t = lane_ / 4 + 8 * h;
        const bool inside = t < rows;
        const float qk = odd ? by_k[h][1] : by_k[h][0], kk = odd ? by_k[h][3] : by_k[h][2];
        const float qq = odd ? by_q[h][1] : by_q[h][0];
        const float rk = p_.l2norm ? ptx::rsqrt(kk + 1e-6f) : 1.f;
        const float rq = p_.l2norm ? ptx::rsqrt(qq + 1e-6f) : 1.f;
        scratch.rk[t] = inside ? rk : 0.f;
        to.rk[token_place(t)] = inside ? rk : 0.f;
        to.rq[token_place(t)] = inside ? p_.scale * rq : 0.f;
        to.M_diagonal[token_place(t)] = inside ? qk : 0.f;
      }
    }
    float beta = bits_to_float(__shfl_sync(~0u, beta_bits, lane_ % kChunk), p_.beta.dtype);
    beta = lane_ % kChunk < rows ? fast_beta_activation(beta, p_.beta_mode) : 0.f;
    if (lane_ < kChunk) scratch.beta[lane_] = beta;
    __syncwarp();
    if (lane_ < kChunk) to.T_diagonal[token_place(lane_)] = scratch.rk[lane_] * beta;

    Square A = {}, M = {};
    if (steep) {
      steep_products(A, M, raw, hat, rows);
      ptx::fence_async_proxy();  // fp32 gates were written over, and the copy engine writes next
      ptx::mbarrier_arrive_at(at(&s_.raw_empty[warp_]));
    } else {
      plain_products(A, M, to, hat);
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = column(h, 0);
      const float rk0 = scratch.rk[j], rk1 = scratch.rk[j + 1];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = row(2 * r);
        const float factor = scratch.beta[i] * scratch.rk[i];
        scratch.A[j * kTriangleStride + i] = j < i ? A[h][2 * r] * factor * rk0 : 0.f;
        scratch.A[(j + 1) * kTriangleStride + i] = j + 1 < i ? A[h][2 * r + 1] * factor * rk1 : 0.f;
        *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(to.M) + square_offset(i, h) +
                                     (lane_ % 4) * 4) =
            Traits::pack(j < i ? M[h][2 * r] : 0.f, j + 1 < i ? M[h][2 * r + 1] : 0.f);
      }
    }
    __syncwarp();
    invert_triangle(to.T, scratch.A, scratch.rk, scratch.beta, lane_);
    hand_over(to, &s_.full[slot]);
  }

  const Problem& p_;
  const Work& w_;
  Shared<Cfg>& s_;
  Loader<Cfg> loader_;
  uint32_t base_;
  int warp_, lane_;
  int rank_;  // of the block in its cluster
  int tokens_, chunks_;
  int64_t first_beta_;
};

}  // namespace flashkda::cuda::sm90::prefill
