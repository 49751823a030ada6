// The chain warps: they carry the state through the chunks. A warp owns 16 value columns and keeps
// their state transposed, S^T [V, K], in accumulators, where it is at once the left operand of the
// next chunk's products; nothing of the chain passes through shared memory and the warps never wait
// for each other.
//
//   X = V - diag(rk) k_bar S     U = T X     O = diag(rq) (q_bar S + M U)     S = diag(decay) S +
//   k_tilde^T U
//
// all transposed. T and U carry rk (producer.cuh), so that k_bar and k_tilde need not. The
// diagonals of T and M multiply in fp32, unrounded: with fast decay they are most of U and O.
#pragma once

#include "../../common/element.cuh"
#include "../../common/ptx.cuh"
#include "../../common/state_columns.cuh"
#include "../../common/tile.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

template <class Cfg>
class Chain {
  using Elem = typename Cfg::Elem;
  using Traits = ElementTraits<Elem>;
  static constexpr int K = Cfg::K;

 public:
  __device__ Chain(const Problem& p, const Work& w, const Ring& ring, char* smem, int warp,
                   int lane)
      : p_(p), w_(w), ring_(ring), smem_(smem), lane_(lane), v_(warp * 16) {}

  __device__ void run() {
    static_assert(kCheckpointUnit == kChunk, "a checkpoint lies between two steps");
    const StateColumns<K> columns{static_cast<int>(w_.n), static_cast<int>(w_.tokens), w_.hv,
                                  w_.v0 + v_, lane_};
    float S[K / 8][4];
    columns.load(p_, S);
    RingPosition at(0);
    Elem* o = static_cast<Elem*>(p_.o.ptr) + w_.row * p_.o.stride_b +
              (w_.begin + lane_ / 2) * p_.o.stride_t + w_.hv * p_.o.stride_h + w_.v0 + v_ +
              lane_ % 2 * (kPiece / sizeof(Elem));
    int left = columns.tokens;
    int stop = columns.first_stop(p_);
    // One loop with a comparison in it: a loop between two stops of its own is four instructions
    // shorter and makes the compiler spill the producers' registers.
    while (true) {
      if (left == stop) stop = columns.keep(p_, S, left);
      if (left <= 0) break;
      step(S, at, o, left);
      at.advance(1, ring_);
      o += kChunk * p_.o.stride_t;
      left -= kChunk;
    }
    columns.store_final(p_, S);
    columns.spoil_wrong_checkpoints(p_);
  }

 private:
  __device__ __forceinline__ void step(float (&S)[K / 8][4], const RingPosition& at, Elem* to,
                                       int left) const {
    Slot<Cfg>* slot = slot_at<Cfg>(smem_, at.slot);
    Barriers* barriers = barriers_at(smem_);
    // Addresses are cheaper to find again every step than to keep beside the state.
    const int lane = ptx::opaque(lane_);
    const LanePosition rows = by_row(lane);
    const LanePosition columns = by_column(lane);
    const int square = square_offset(columns.row, columns.piece);
    const int token = (lane % 4) * 2;  // and the next, of each half of the chunk
    const char* k_bar = reinterpret_cast<const char*>(slot->k_bar);
    const char* q_bar = reinterpret_cast<const char*>(slot->q);
    const char* k_tilde = reinterpret_cast<const char*>(slot->k_tilde);
    ptx::mbarrier_wait(&barriers->full[at.slot], at.parity);

    // Every operand is loaded one product ahead of its use.
    uint32_t bk[2][4], bq[2][4];
    ldmatrix(bk[0], k_bar + tile_offset<K>(columns.row, columns.piece));
    ldmatrix(bq[0], q_bar + tile_offset<K>(columns.row, columns.piece));
    uint32_t v[4], bT[4], bM[4];
    float2 rk[2];
    float x[2][4] = {}, o[2][4] = {};
#pragma unroll
    for (int kk = 0; kk < K / 16; ++kk) {
      if (kk + 1 < K / 16) {
        const int offset = tile_offset<K>(columns.row, 2 * kk + 2 + columns.piece);
        ldmatrix(bk[(kk + 1) % 2], k_bar + offset);
        ldmatrix(bq[(kk + 1) % 2], q_bar + offset);
      } else {
        ldmatrix_trans(v, reinterpret_cast<const char*>(slot->v) +
                              tile_offset<Cfg::VS>(rows.row, v_ / 8 + rows.piece));
        ldmatrix(bT, reinterpret_cast<const char*>(slot->T) + square);
        ldmatrix(bM, reinterpret_cast<const char*>(slot->M) + square);
        rk[0] = *reinterpret_cast<const float2*>(slot->rk + token);
        rk[1] = *reinterpret_cast<const float2*>(slot->rk + 8 + token);
      }
      uint32_t a[4];
      to_operand<Elem>(a, S[2 * kk], S[2 * kk + 1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma<Elem>(x[half], a, bk[kk % 2][2 * half], bk[kk % 2][2 * half + 1]);
        mma<Elem>(o[half], a, bq[kk % 2][2 * half], bq[kk % 2][2 * half + 1]);
      }
    }

    uint32_t u[4], b[2][4];
    float2 decay[2][2];
    ldmatrix_trans(b[0], k_tilde + tile_offset<K>(rows.row, rows.piece));
    decay[0][0] = *reinterpret_cast<const float2*>(slot->decay + token);
    decay[0][1] = *reinterpret_cast<const float2*>(slot->decay + 8 + token);
    {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 lower = Traits::unpack(v[half]), upper = Traits::unpack(v[2 + half]);
        x[half][0] = lower.x - rk[half].x * x[half][0];
        x[half][1] = lower.y - rk[half].y * x[half][1];
        x[half][2] = upper.x - rk[half].x * x[half][2];
        x[half][3] = upper.y - rk[half].y * x[half][3];
      }
      uint32_t a[4];
      to_operand<Elem>(a, x[0], x[1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 T = *reinterpret_cast<const float2*>(slot->T_diagonal + half * 8 + token);
        const float2 M = *reinterpret_cast<const float2*>(slot->M_diagonal + half * 8 + token);
        x[half][0] *= T.x;
        x[half][1] *= T.y;
        x[half][2] *= T.x;
        x[half][3] *= T.y;
        mma<Elem>(x[half], a, bT[2 * half], bT[2 * half + 1]);
        o[half][0] += M.x * x[half][0];
        o[half][1] += M.y * x[half][1];
        o[half][2] += M.x * x[half][2];
        o[half][3] += M.y * x[half][3];
      }
      to_operand<Elem>(u, x[0], x[1]);
    }

#pragma unroll
    for (int nn = 0; nn < K / 16; ++nn) {
      if (nn + 1 < K / 16) {
        ldmatrix_trans(b[(nn + 1) % 2],
                       k_tilde + tile_offset<K>(rows.row, 2 * nn + 2 + rows.piece));
        const float* next = slot->decay + (2 * nn + 2) * 8 + token;
        decay[(nn + 1) % 2][0] = *reinterpret_cast<const float2*>(next);
        decay[(nn + 1) % 2][1] = *reinterpret_cast<const float2*>(next + 8);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 2 * nn + i;
        const float2 d = decay[nn % 2][i];
        S[n][0] *= d.x;
        S[n][1] *= d.y;
        S[n][2] *= d.x;
        S[n][3] *= d.y;
        mma<Elem>(S[n], u, b[nn % 2][2 * i], b[nn % 2][2 * i + 1]);
      }
    }
    mma<Elem>(o[0], u, bM[0], bM[1]);
    mma<Elem>(o[1], u, bM[2], bM[3]);
    store_output(o, slot, to, left);
    ptx::mbarrier_arrive(&barriers->empty[at.slot]);
  }

  // O goes through the warp's own columns of v's tile, which it has read, so that it leaves in rows
  // of 16 bytes.
  __device__ __forceinline__ void store_output(const float (&o)[2][4], Slot<Cfg>* slot, Elem* to,
                                               int left) const {
    char* tile = reinterpret_cast<char*>(slot->v);
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 rq = *reinterpret_cast<const float2*>(slot->rq + half * 8 + (lane_ % 4) * 2);
#pragma unroll
      for (int values = 0; values < 2; ++values) {
        const float* x = o[half] + 2 * values;
        const uint32_t y = ptx::movmatrix_trans(Traits::pack(x[0] * rq.x, x[1] * rq.y));
        *reinterpret_cast<uint32_t*>(
            tile + tile_offset<Cfg::VS>(half * 8 + lane_ / 4, v_ / 8 + values) + (lane_ % 4) * 4) =
            y;
      }
    }
    __syncwarp();
    const int row = lane_ / 2, piece = lane_ % 2;
    const uint4 y =
        *reinterpret_cast<const uint4*>(tile + tile_offset<Cfg::VS>(row, v_ / 8 + piece));
    if (row >= left) return;
    if (reinterpret_cast<uintptr_t>(to) % kPiece == 0) {
      *reinterpret_cast<uint4*>(to) = y;
    } else {
      const uint32_t words[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        reinterpret_cast<uint16_t*>(to)[j] = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
      }
    }
  }

  const Problem& p_;
  const Work& w_;
  const Ring& ring_;
  char* smem_;
  int lane_;
  int v_;  // the warp's first value column within the block's
};

}  // namespace flashkda::cuda::sm80::prefill
