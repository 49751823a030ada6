// The chain warps: they carry the state through the chunks. A warp owns 16 value columns and keeps
// their state transposed, S^T [V, K], in accumulators, where it is at once the left operand of the
// next chunk's products; nothing of the chain passes through shared memory and the warps never wait
// for each other.
//
//   S = diag(enter) S     X = V - diag(rk) k_bar S     U = T X     O = diag(rq) (q_bar S + M U)
//   S = diag(leave) S + k_tilde^T U
//
// all transposed; enter is 1 but for steep gates (producer.cuh). T and U carry rk (producer.cuh),
// so that k_bar and k_tilde need not. The diagonals of T and M multiply in fp32, unrounded: with
// fast decay they are most of U and O.
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
  static constexpr bool kManyRegisters = Cfg::kMakers > 0;  // no producers beside the chain
  static constexpr int kAhead = kManyRegisters ? 2 : 1;     // how many products ahead it loads

 public:
  __device__ Chain(const Problem& p, const Work& w, int slots, char* smem, int warp, int lane)
      : p_(p), w_(w), slots_(slots), smem_(smem), lane_(lane), v_(warp * 16) {
    if constexpr (kManyRegisters) {
      const LanePosition rows = by_row(lane), columns = by_column(lane);
      places_ = {ptx::opaque(tile_offset<K>(rows.row, rows.piece)),
                 ptx::opaque(tile_offset<K>(columns.row, columns.piece)),
                 ptx::opaque(tile_offset<Cfg::VS>(rows.row, v_ / 8 + rows.piece)),
                 ptx::opaque(square_offset(columns.row, columns.piece))};
    }
  }

  __device__ void run() {
    static_assert(kCheckpointUnit == kChunk, "a checkpoint lies between two steps");
    const StateColumns<K> columns{static_cast<int>(w_.n), static_cast<int>(w_.tokens), w_.hv,
                                  w_.v0 + v_, lane_};
    float S[K / 8][4];
    columns.load(p_, S);
    RingPosition at(0);
    Elem* o = static_cast<Elem*>(p_.o.ptr) + w_.row * p_.o.stride_b +
              (w_.begin + lane_ / 4) * p_.o.stride_t + w_.hv * p_.o.stride_h + w_.v0 + v_ +
              lane_ % 2 * 8 + lane_ / 2 % 2 * 4;
    int left = columns.tokens;
    int stop = columns.first_stop(p_);
    // One loop with a comparison in it: a loop between two stops of its own is four instructions
    // shorter, and where registers are scarce makes the compiler spill the producers'.
    while (true) {
      if (left == stop) stop = columns.keep(p_, S, left);
      if (left <= 0) break;
      do {
        step(S, at, o, left);
        at.advance(1, slots_);
        o += kChunk * p_.o.stride_t;
        left -= kChunk;
      } while (kManyRegisters && left > max(stop, 0));
    }
    columns.store_final(p_, S);
    columns.spoil_wrong_checkpoints(p_);
  }

 private:
  // Where the lane's operands lie in the tiles that they are parts of, in bytes: left and right
  // ones of K channels, v, T and M.
  struct Places {
    int rows, columns, v, square;
  };

  // Both halves of what a lane needs of 16 `paired` numbers.
  static __device__ __forceinline__ void load_pairs(float2 (&x)[2], const float* paired, int lane) {
    const float4 y = *reinterpret_cast<const float4*>(paired + lane % 4 * 4);
    x[0] = {y.x, y.y};
    x[1] = {y.z, y.w};
  }

  __device__ __forceinline__ void step(float (&S)[K / 8][4], const RingPosition& at, Elem* to,
                                       int left) const {
    Slot<Cfg>* slot = slot_at<Cfg>(smem_, at.slot);
    Barriers* barriers = barriers_at(smem_);
    // Where registers are scarce, addresses are cheaper to find again every step than to keep
    // beside the state.
    const int lane = kManyRegisters ? lane_ : ptx::opaque_lane(lane_);
    const LanePosition rows = by_row(lane), columns = by_column(lane);
    const int square = kManyRegisters ? places_.square : square_offset(columns.row, columns.piece);
    const int token = (lane % 4) * 2;  // and the next, of each half of the chunk
    const int at_columns =
        kManyRegisters ? places_.columns : tile_offset<K>(columns.row, columns.piece);
    const uint32_t k_bar = ptx::smem_address(slot->k_bar) + at_columns;
    const uint32_t q_bar = ptx::smem_address(slot->q) + at_columns;
    const uint32_t k_tilde = ptx::smem_address(slot->k_tilde) +
                             (kManyRegisters ? places_.rows : tile_offset<K>(rows.row, rows.piece));
    ptx::mbarrier_wait(&barriers->full[at.slot], at.parity);

    // Every operand is loaded kAhead products ahead of its use.
    constexpr int kHeld = kAhead + 1;
    uint32_t bk[kHeld][4], bq[kHeld][4];
#pragma unroll
    for (int kk = 0; kk < kAhead; ++kk) {
      ldmatrix(bk[kk], pieces_on(k_bar, kk));
      ldmatrix(bq[kk], pieces_on(q_bar, kk));
    }
    const bool middle = slot->reference == Reference::kMiddle;
    if (kManyRegisters ? __builtin_expect(middle, false) : middle) enter(S, slot, lane);
    uint32_t v[4], bT[4], bM[4], b[kHeld][4];
    float2 rk[2], leave[kHeld][2], T[2], M[2], rq[2];
    const auto load_update = [&](int nn) {
      ldmatrix_trans(b[nn % kHeld], pieces_on(k_tilde, nn));
      load_pairs(leave[nn % kHeld], slot->leave + nn * 16, lane);
    };
    const auto load_diagonals = [&] {
      load_pairs(T, slot->T_diagonal, lane);
      load_pairs(M, slot->M_diagonal, lane);
      load_pairs(rq, slot->rq, lane);
    };
    float x[2][4] = {}, o[2][4] = {};
#pragma unroll
    for (int kk = 0; kk < K / 16; ++kk) {
      if (kk + kAhead < K / 16) {
        ldmatrix(bk[(kk + kAhead) % kHeld], pieces_on(k_bar, kk + kAhead));
        ldmatrix(bq[(kk + kAhead) % kHeld], pieces_on(q_bar, kk + kAhead));
      } else if (kk + kAhead > K / 16) {
        load_diagonals();
        load_update(0);
      } else {
        ldmatrix_trans(
            v,
            reinterpret_cast<const char*>(slot->v) +
                (kManyRegisters ? places_.v : tile_offset<Cfg::VS>(rows.row, v_ / 8 + rows.piece)));
        ldmatrix(bT, reinterpret_cast<const char*>(slot->T) + square);
        ldmatrix(bM, reinterpret_cast<const char*>(slot->M) + square);
        rk[0] = *reinterpret_cast<const float2*>(slot->rk + token);
        rk[1] = *reinterpret_cast<const float2*>(slot->rk + 8 + token);
      }
      uint32_t a[4];
      to_operand<Elem>(a, S[2 * kk], S[2 * kk + 1]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        mma<Elem>(x[half], a, bk[kk % kHeld][2 * half], bk[kk % kHeld][2 * half + 1]);
        mma<Elem>(o[half], a, bq[kk % kHeld][2 * half], bq[kk % kHeld][2 * half + 1]);
      }
    }

    uint32_t u[4];
    load_update(kAhead - 1);
    if constexpr (kAhead == 1) load_diagonals();
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
        x[half][0] *= T[half].x;
        x[half][1] *= T[half].y;
        x[half][2] *= T[half].x;
        x[half][3] *= T[half].y;
        mma<Elem>(x[half], a, bT[2 * half], bT[2 * half + 1]);
        o[half][0] += M[half].x * x[half][0];
        o[half][1] += M[half].y * x[half][1];
        o[half][2] += M[half].x * x[half][2];
        o[half][3] += M[half].y * x[half][3];
      }
      to_operand<Elem>(u, x[0], x[1]);
    }
    mma<Elem>(o[0], u, bM[0], bM[1]);
    mma<Elem>(o[1], u, bM[2], bM[3]);

#pragma unroll
    for (int nn = 0; nn < K / 16; ++nn) {
      if (nn + kAhead < K / 16) load_update(nn + kAhead);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int n = 2 * nn + i;
        scale(S[n], leave[nn % kHeld][i]);
        mma<Elem>(S[n], u, b[nn % kHeld][2 * i], b[nn % kHeld][2 * i + 1]);
      }
    }
    uint32_t output[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int values = 0; values < 2; ++values) {
        const float* z = o[half] + 2 * values;
        output[half][values] =
            ptx::movmatrix_trans(Traits::pack(z[0] * rq[half].x, z[1] * rq[half].y));
      }
    }
    // An arrival may overtake a load whose result has not come. None is on its way here: each is an
    // operand of a product or a transposition above, or of what these take.
    ptx::mbarrier_arrive(&barriers->empty[at.slot]);
    store_output(output, to, left, lane);
  }

  static __device__ __forceinline__ void scale(float (&x)[4], const float2& by) {
    x[0] *= by.x;
    x[1] *= by.y;
    x[2] *= by.x;
    x[3] *= by.y;
  }

  static __device__ __forceinline__ void enter(float (&S)[K / 8][4], const Slot<Cfg>* slot,
                                               int lane) {
#pragma unroll
    for (int nn = 0; nn < K / 16; ++nn) {
      const uint2 y = *reinterpret_cast<const uint2*>(slot->enter + nn * 16 + lane % 4 * 4);
      scale(S[2 * nn], Traits::unpack(y.x));
      scale(S[2 * nn + 1], Traits::unpack(y.y));
    }
  }

  // Rows of 16 columns, four of them a lane: a product leaves it two of either half of a row, and
  // two lanes exchange.
  __device__ __forceinline__ void store_output(const uint32_t (&x)[2][2], Elem* to, int left,
                                               int lane) const {
    const bool odd = lane & 1;
    uint2 y[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t other = __shfl_xor_sync(~0u, odd ? x[half][0] : x[half][1], 1);
      y[half] = odd ? make_uint2(other, x[half][1]) : make_uint2(x[half][0], other);
    }
    const bool aligned = reinterpret_cast<uintptr_t>(to) % sizeof(uint2) == 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * 8 + lane / 4 >= left) return;
      if (aligned) {
        *reinterpret_cast<uint2*>(to) = y[half];
      } else {
        const uint32_t words[2] = {y[half].x, y[half].y};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          reinterpret_cast<uint16_t*>(to)[j] =
              static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
        }
      }
      to += 8 * p_.o.stride_t;
    }
  }

  const Problem& p_;
  const Work& w_;
  int slots_;
  char* smem_;
  int lane_;
  int v_;  // the warp's first value column within the block's
  Places places_;
};

}  // namespace flashkda::cuda::sm80::prefill
