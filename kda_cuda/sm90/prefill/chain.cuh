// The chain warpgroups: they carry the state through the chunks. A warpgroup owns 64 value columns
// and keeps their state transposed, S^T [V, K], in wgmma's accumulators, where it is at once,
// rounded, the left operand of the next chunk's product; nothing of the chain passes through shared
// memory and the warpgroups never wait for each other.
//
//   X = V - diag(rk) k_bar S    U = T X    O = diag(rq) (q_bar S + M U)
//   S = diag(decay) S + k_tilde^T U
//
// all transposed. The products with S and k_tilde are wgmma's, those with T and M, of 16 x 16, are
// a warp's own. The diagonals of T and M multiply in fp32, unrounded.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "../../common/element.cuh"
#include "../../common/state_columns.cuh"
#include "../ptx.cuh"
#include "shared.cuh"
#include "tile.cuh"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
class Chain {
  using Elem = __nv_bfloat16;
  using Traits = ElementTraits<Elem>;
  using Major = cute::SM90::GMMA::Major;
  static constexpr int kTiles = kChannels / 8;  // of the accumulator: eight channels each

 public:
  __device__ Chain(const Problem& p, const Work& w, Shared<Cfg>& s, uint32_t base, int warp,
                   int lane)
      : p_(p), w_(w), s_(s), base_(base), lane_(lane), warp_(warp) {}

  __device__ void run() {
    static_assert(kCheckpointUnit == kChunk, "a checkpoint lies between two steps");
    const StateColumns<kChannels> columns{static_cast<int>(w_.n), static_cast<int>(w_.tokens),
                                          w_.hv, w_.v0 + warp_ * 16, lane_};
    float S[kTiles][4];
    columns.load(p_, S);
    const int64_t stride = kChunk * p_.o.stride_t;
    Elem* o = static_cast<Elem*>(p_.o.ptr) + w_.row * p_.o.stride_b +
              (w_.begin + lane_ / 2) * p_.o.stride_t + w_.hv * p_.o.stride_h + w_.v0 + warp_ * 16 +
              lane_ % 2 * (kPiece / sizeof(Elem));
    int left = columns.tokens;
    int stop = columns.first_stop(p_);
    int at = 0;
    uint32_t parity = 0;
    bool staged = false;
    while (true) {
      // Shuffled, so that the compiler sees that a warpgroup's threads walk together.
      const int bound = __shfl_sync(~0u, max(stop, 0), 0);
#pragma unroll 1
      while (left > bound) {
        step(S, at, parity, left, [&] {
          if (!staged) return;
          store_output(o, kChunk);
          o += stride;
        });
        staged = true;
        at = at + 1 == Cfg::kSlots ? 0 : at + 1;
        parity ^= at == 0;
        left -= kChunk;
      }
      if (left != stop) break;
      stop = columns.keep(p_, S, left);
    }
    __syncwarp();
    if (staged) store_output(o, left + kChunk);
    columns.store_final(p_, S);
    columns.spoil_wrong_checkpoints(p_);
  }

 private:
  __device__ __forceinline__ uint32_t at_of(const void* part) const {
    return address_of(s_, base_, part);
  }

  // d = S^T [k_bar; q_bar]^T: tiles 0, 1 are k_bar S, tiles 2, 3 q_bar S.
  __device__ __forceinline__ void start_state_product(float (&d)[4][4], const float (&S)[kTiles][4],
                                                      const Slot& f) const {
    using Product = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, Major::K>;
    uint32_t a[kTiles / 2][4];
#pragma unroll
    for (int kk = 0; kk < kTiles / 2; ++kk) to_operand<Elem>(a[kk], S[2 * kk], S[2 * kk + 1]);
    const uint32_t bars = descriptor_address(at_of(f.bars));
    cute::warpgroup_arrive();
#pragma unroll
    for (int kk = 0; kk < kTiles / 2; ++kk) {
      const uint64_t b =
          make_descriptor(bars + kk / 4 * sizeof(f.bars[0]) / kPiece + kk % 4 * 2, 0);
      Product::fma(a[kk][0], a[kk][1], a[kk][2], a[kk][3], b, d[0][0], d[0][1], d[0][2], d[0][3],
                   d[1][0], d[1][1], d[1][2], d[1][3], d[2][0], d[2][1], d[2][2], d[2][3], d[3][0],
                   d[3][1], d[3][2], d[3][3],
                   kk == 0 ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One);
    }
    cute::warpgroup_commit_batch();
  }

  // S^T += U^T k_tilde.
  __device__ __forceinline__ void start_update(float (&S)[kTiles][4], const uint32_t (&u)[4],
                                               const Slot& f) const {
    using Product = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;
    const uint64_t b = make_descriptor(descriptor_address(at_of(f.k_tilde)), sizeof(f.k_tilde[0]));
#define FLASHKDA_TILE(n) S[n][0], S[n][1], S[n][2], S[n][3]
    Product::fma(u[0], u[1], u[2], u[3], b, FLASHKDA_TILE(0), FLASHKDA_TILE(1), FLASHKDA_TILE(2),
                 FLASHKDA_TILE(3), FLASHKDA_TILE(4), FLASHKDA_TILE(5), FLASHKDA_TILE(6),
                 FLASHKDA_TILE(7), FLASHKDA_TILE(8), FLASHKDA_TILE(9), FLASHKDA_TILE(10),
                 FLASHKDA_TILE(11), FLASHKDA_TILE(12), FLASHKDA_TILE(13), FLASHKDA_TILE(14),
                 FLASHKDA_TILE(15));
#undef FLASHKDA_TILE
    cute::warpgroup_commit_batch();
  }

  // Zeroes what v holds of tokens from `left` on: rows past the sequence's end are another's, and
  // may be anything.
  __device__ __forceinline__ void keep_tokens(uint32_t (&v)[4], int left) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int kept = left - half * 8 - lane_ % 4 * 2;
      const uint32_t mask = kept >= 2 ? 0xffffffffu : kept == 1 ? 0xffffu : 0u;
      v[half] &= mask;
      v[2 + half] &= mask;
    }
  }

  // A float of each of the lane's tokens 2 (lane % 4) + {0, 1} and 8 + ...
  __device__ __forceinline__ float4 of_tokens(const float (&x)[kChunk]) const {
    return reinterpret_cast<const float4*>(x)[lane_ % 4];
  }

  static __device__ __forceinline__ void scale(float (&x)[4], float even, float odd) {
    x[0] *= even;
    x[1] *= odd;
    x[2] *= even;
    x[3] *= odd;
  }

  // Tells the block that makes the slot's chunks.
  __device__ __forceinline__ void release(int slot) const {
    const uint32_t empty = at_of(&s_.empty[slot / Cfg::kCluster]);
    if constexpr (Cfg::kCluster > 1) {
      __syncwarp();
      if (cute::elect_one_sync()) {
        ptx::mbarrier_arrive_in_cluster(ptx::address_in(empty, slot % Cfg::kCluster));
      }
    } else {
      ptx::mbarrier_arrive_at(empty);
    }
  }

  static __device__ __forceinline__ void fence(float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) cute::warpgroup_fence_operand(x[i]);
  }

  // One chunk. `shadow` is done while the product with the state is under way.
  template <class Shadow>
  __device__ __forceinline__ void step(float (&S)[kTiles][4], int at, uint32_t parity, int left,
                                       const Shadow& shadow) const {
    const Slot& slot = s_.slots[at];
    const LanePosition rows = by_row(lane_), columns = by_column(lane_);
    ptx::mbarrier_wait_at(at_of(&s_.full[at]), parity);

    float d[4][4];
    start_state_product(d, S, slot);
    shadow();
    uint32_t v[4], T[4], M[4];
    const int square = square_offset(columns.row, columns.piece);
    ptx::mbarrier_wait_at(at_of(&s_.values_full[at]), parity);
    ptx::ldmatrix_trans_at(
        v, at_of(&s_.values[at][warp_ / 4]) + row_offset(rows.row, warp_ % 4 * 2 + rows.piece));
    ptx::ldmatrix_at(T, at_of(slot.T) + square);
    ptx::ldmatrix_at(M, at_of(slot.M) + square);
    const float4 rk = of_tokens(slot.rk), T_diagonal = of_tokens(slot.T_diagonal);
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int n = 0; n < 4; ++n) fence(d[n]);

    if (left < kChunk) keep_tokens(v, left);
    // Tiles 0 and 1 of d become X, then U; tiles 2 and 3 O.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 lower = Traits::unpack(v[half]), upper = Traits::unpack(v[2 + half]);
      const float even = half == 0 ? rk.x : rk.z, odd = half == 0 ? rk.y : rk.w;
      d[half][0] = lower.x - even * d[half][0];
      d[half][1] = lower.y - odd * d[half][1];
      d[half][2] = upper.x - even * d[half][2];
      d[half][3] = upper.y - odd * d[half][3];
    }
    ptx::mbarrier_arrive_at(at_of(&s_.values_empty[at]));
    uint32_t x[4], u[4];
    to_operand<Elem>(x, d[0], d[1]);
    scale(d[0], T_diagonal.x, T_diagonal.y);
    scale(d[1], T_diagonal.z, T_diagonal.w);
    mma<Elem>(d[0], x, T[0], T[1]);
    mma<Elem>(d[1], x, T[2], T[3]);
    // Fills the latencies of the way from X to U. Earlier, while the product is under way, the
    // compiler would wait for it before it touched S.
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      const float4 decay =
          reinterpret_cast<const float4*>(slot.decay + lane_ % 4 * kDecayStride)[n / 2];
      scale(S[n], decay.x, decay.y);
      scale(S[n + 1], decay.z, decay.w);
    }
    to_operand<Elem>(u, d[0], d[1]);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) fence(S[n]);
    cute::warpgroup_arrive();
    start_update(S, u, slot);

    const float4 M_diagonal = of_tokens(slot.M_diagonal), rq = of_tokens(slot.rq);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float even = half == 0 ? M_diagonal.x : M_diagonal.z;
      const float odd = half == 0 ? M_diagonal.y : M_diagonal.w;
      d[2 + half][0] += even * d[half][0];
      d[2 + half][1] += odd * d[half][1];
      d[2 + half][2] += even * d[half][2];
      d[2 + half][3] += odd * d[half][3];
      mma<Elem>(d[2 + half], u, M[2 * half], M[2 * half + 1]);
    }
    scale(d[2], rq.x, rq.y);
    scale(d[3], rq.z, rq.w);
    stage_output(d[2], d[3]);
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int n = 0; n < kTiles; ++n) fence(S[n]);
    release(at);
  }

  // O^T goes through shared memory, so that it leaves in rows of 16 bytes, a chunk later.
  __device__ __forceinline__ void stage_output(const float (&early)[4],
                                               const float (&late)[4]) const {
    __syncwarp();
    ptx::stmatrix_trans_at(
        at_of(s_.o[warp_]) + square_offset((lane_ & 7) + (lane_ >> 4) * 8, (lane_ >> 3) & 1),
        Traits::pack(early[0], early[1]), Traits::pack(early[2], early[3]),
        Traits::pack(late[0], late[1]), Traits::pack(late[2], late[3]));
  }

  __device__ __forceinline__ void store_output(Elem* to, int left) const {
    const int row = lane_ / 2;
    const uint4 y = *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(s_.o[warp_]) +
                                                    square_offset(row, lane_ % 2));
    if (row < left) *reinterpret_cast<uint4*>(to) = y;
  }

  const Problem& p_;
  const Work& w_;
  Shared<Cfg>& s_;
  uint32_t base_;
  int lane_;
  int warp_;  // of all chain warps: 16 value columns each
};

}  // namespace flashkda::cuda::sm90::prefill
