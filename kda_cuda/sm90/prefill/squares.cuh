// The square warps: each, a chunk at a time, makes the 16 x 16 matrices T and M from the factors
// and the norms of q and k, which come from products of the raw tiles on the tensor cores: exact
// products of bf16 and fp32 sums. The diagonals, which weigh most where decay is fast, never see
// rounded factors.
#pragma once

#include "../../common/convert.cuh"
#include "../../common/decay.cuh"
#include "../../common/element.cuh"
#include "../ptx.cuh"
#include "loader.cuh"
#include "shared.cuh"
#include "tile.cuh"
#include "triangle.cuh"
#include "turn.cuh"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
class SquareWarp {
  using Elem = __nv_bfloat16;
  using Traits = ElementTraits<Elem>;

  // A 16 x 16 accumulator: columns 0-7 and 8-15. Element i of a half is row row(i), column
  // column(half, i).
  using Square = float[2][4];

 public:
  __device__ SquareWarp(const Problem& p, const Maps& maps, const Work& w, Shared<Cfg>& s, int rank,
                        int warp, int lane)
      : p_(p),
        w_(w),
        s_(s),
        loader_(p, maps, s),
        warp_(warp),
        lane_(lane),
        rank_(rank),
        part_(warp % 2),
        tokens_(static_cast<int>(w.tokens)) {}

  __device__ void run() {
    Turn<Cfg> turn(rank_, warp_ / 2);
    Cursor use(uses<Cfg>(rank_));
    use.advance(warp_ / 2);
    const bool chains = has_chain<Cfg>(rank_), alone = makes_few<Cfg>(rank_);
    {
      // Of the first chunks, whose slots nobody has used.
      Turn<Cfg> first = turn;
      Cursor first_use = use;
      for (int i = warp_ / 2; i < max(held<Cfg>(rank_) - 1, 1); i += 2) {
        load_raw(first, first_use, unused(first_use));
        first.advance(2);
        first_use.advance(2);
      }
    }
    uint32_t next_beta = load_beta(turn);
#pragma unroll 1
    while (true) {
      const int first = turn.chunk() * kChunk;
      if ((chains && !alone ? (turn.ring + turn.first_values()) * kChunk : first) >= tokens_) break;
      // Addresses are cheaper to find again for every chunk than to keep.
      lane_ = ptx::opaque_lane(lane_);
      const auto load_later = [&](int chunks) {
        Turn<Cfg> later = turn;
        Cursor later_use = use;
        later.advance(chunks);
        later_use.advance(chunks);
        load_raw(later, later_use, alone ? use : use.before());
      };
      if (!alone) load_later(held<Cfg>(rank_) - 1);
      // Of the slots that are this turn's, either warp fills its own.
      if (chains && !alone && part_ < turn.values()) {
        loader_.load_values(turn.ring, turn.first_values() + part_, turn.parity, tokens_);
      }
      const uint32_t beta = next_beta;
      Turn<Cfg> next = turn;
      next.advance(alone ? 1 : 2);
      next_beta = load_beta(next);
      const auto emptied = [&] {
        if (alone) load_later(1);
      };
      if (first < tokens_) make(tokens_ - first - part_ * kPart, use, turn, beta, emptied);
      if constexpr (Cfg::kApart) put_ = turn.chunk();
      use.advance(alone ? 1 : 2);
      turn = next;
    }
    if constexpr (Cfg::kApart) {
      if (cute::elect_one_sync()) publish();
    }
  }

 private:
  static __device__ __forceinline__ uint32_t at(const void* part) {
    return ptx::smem_address(part);
  }

  // Warps 0 and 1 take the parts of a chunk and warps 2 and 3 those of the block's next.
  static_assert(kSquareWarps == 4);

  // Begins to load the turn's chunk, if there is one. before: the use of the chunk whose place it
  // takes.
  __device__ __forceinline__ void load_raw(const Turn<Cfg>& turn, const Cursor& use,
                                           const Cursor& before) const {
    const int first = turn.chunk() * kChunk;
    if (first < tokens_) {
      loader_.load_raw(first, turn.head(), part_, raw_of(use), use, before);
    }
  }

  __device__ __forceinline__ Raw& raw_of(const Cursor& use) const {
    return s_.raw[use.at % held<Cfg>(rank_)];
  }

  // A use before the first, for which nobody waits.
  static __device__ __forceinline__ Cursor unused(const Cursor& use) {
    Cursor x = use;
    x.parity = 1;
    return x;
  }

  __device__ __forceinline__ int row(int i) const { return lane_ / 4 + (i / 2) * 8; }
  __device__ __forceinline__ int column(int half, int i) const {
    return half * 8 + (lane_ % 4) * 2 + (i & 1);
  }

  // The bits of the part's token lane's beta. Nothing waits for them before the turn.
  __device__ __forceinline__ uint32_t load_beta(const Turn<Cfg>& turn) const {
    const TokenTensor& b = p_.beta;
    const int token = turn.chunk() * kChunk + part_ * kPart + lane_;
    if (lane_ >= kPart || token >= tokens_) return 0;
    const int64_t place =
        w_.row * b.stride_b + (w_.hv + turn.head()) * b.stride_h + (w_.begin + token) * b.stride_t;
    return load_bits(b.ptr, place, b.dtype);
  }

  // Where this lane's row of a 16 x 16 block lies, for ldmatrix, from rows of 128 bytes on; of the
  // next block it lies at next(place, 1).
  static __device__ __forceinline__ uint32_t block(uint32_t rows, int piece,
                                                   const LanePosition& x) {
    return rows + row_offset(x.row, piece + x.piece);
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

  // Places of the four 16-channel blocks of a half.
  struct Blocks {
    uint32_t places[kHalf / 16];

    __device__ __forceinline__ Blocks(uint32_t rows, const LanePosition& x) {
#pragma unroll
      for (int i = 0; i < kHalf / 16; ++i) places[i] = next(block(rows, 0, x), i);
    }
    __device__ __forceinline__ uint32_t operator[](int i) const { return places[i]; }
  };

  static constexpr int kLeftHalf = sizeof(Slot::left[0]), kRightHalf = sizeof(Slot::right[0]);
  static constexpr int kQueries = kTileBytes;  // q's rows in Slot::left

  // The rows of the late part that this part multiplies with those of the early part.
  __device__ __forceinline__ uint32_t late_rows(const Slot& slot) const {
    return at(slot.left) + kLateRows + (part_ == 0 ? kQueries : 0);
  }

  // A and M of the part's tokens with each other, and the products of the late part's with the
  // early part's that are this part's to make: of its own right or left factors.
  template <int kPartIndex>
  __device__ __forceinline__ void products(Square& A, Square& M, Square& cross,
                                           const Slot& slot) const {
    const LanePosition rows = by_row(lane_), columns = by_column(lane_);
    const Blocks left(at(slot.left) + kPartIndex * kLateRows, rows);
    const Blocks right(at(slot.right) + kPartIndex * kLateRows, columns);
    const Blocks other = kPartIndex == 0 ? Blocks(at(slot.left) + kLateRows + kQueries, rows)
                                         : Blocks(at(slot.right), columns);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kHalf / 16; ++i) {
        uint32_t k[4], q[4], k_right[4], x[4];
        ptx::ldmatrix_at(k, left[i] + half * kLeftHalf);
        ptx::ldmatrix_at(k_right, right[i] + half * kRightHalf);
        ptx::ldmatrix_at(q, left[i] + half * kLeftHalf + kQueries);
        ptx::ldmatrix_at(x, other[i] + half * (kPartIndex == 0 ? kLeftHalf : kRightHalf));
        multiply(A, k, k_right);
        multiply(M, q, k_right);
        if constexpr (kPartIndex == 0) {
          multiply(cross, x, k_right);
        } else {
          multiply(cross, k, x);
        }
      }
    }
  }

  // The same where some quarter's decay is not the usual one.
  __device__ __forceinline__ void unusual_products(Square& A, Square& M, Square& cross,
                                                   const Slot& slot, const Raw& raw,
                                                   const int4& decays) const {
    const LanePosition rows = by_row(lane_), columns = by_column(lane_), pieces = by_piece(lane_);
    // Of tokens split at the part's middle, and at the middles of its halves: of k, and of q below.
    float far[4] = {}, low[4] = {}, high[4] = {};
    const int lower = rows.row & 7;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int half = quarter / 2, piece = quarter % 2 * 4;
      const int decay = quarter == 0   ? decays.x
                        : quarter == 1 ? decays.y
                        : quarter == 2 ? decays.z
                                       : decays.w;
      const uint32_t left = at(slot.left[half]) + part_ * kLateRows, right = at(slot.right[half]);
      const uint32_t late_place = block(late_rows(slot) + half * kLeftHalf, piece, rows);
      const uint32_t early_place = block(right, piece, columns);
#pragma unroll
      for (int i = 0; i < kQuarter / 16; ++i) {
        uint32_t a[4], b[4];
        ptx::ldmatrix_at(a, next(late_place, i));
        ptx::ldmatrix_at(b, next(early_place, i));
        multiply(cross, a, b);
      }
      if (decay == kUsual) {
        const uint32_t k_place = block(left, piece, rows);
        const uint32_t right_place = block(right + part_ * kLateRows, piece, columns);
#pragma unroll
        for (int i = 0; i < kQuarter / 16; ++i) {
          uint32_t k[4], q[4], k_right[4];
          ptx::ldmatrix_at(k, next(k_place, i));
          ptx::ldmatrix_at(q, next(k_place + kQueries, i));
          ptx::ldmatrix_at(k_right, next(right_place, i));
          multiply(A, k, k_right);
          multiply(M, q, k_right);
        }
      } else {
        const SteepK halves = steep_k(p_.g.dtype, quarter);
        const uint32_t k = at(raw.k[half]) + part_ * kLateRows;
        const uint32_t q = at(raw.q[half]) + part_ * kLateRows;
        const uint32_t k4 = at(raw.g) + part_ * kLateRows + halves.offset;
        const bool below = rows.row >= 8;
        constexpr int kEight = 8 * kRowBytes;
        uint32_t far_right[4], low_right[4], high_right[4];
        ptx::ldmatrix_at(far_right, block(k, piece, pieces));
        ptx::ldmatrix_at(low_right, block(k4, halves.piece, pieces));
        ptx::ldmatrix_at(high_right, block(k4 + kEight, halves.piece, pieces));
        const uint32_t far_place = block((below ? q : k) + kEight, piece, {lower, rows.piece});
        const uint32_t low_place =
            block(below ? q : k4, below ? piece : halves.piece, {lower, rows.piece});
        const uint32_t high_place = below ? block(q, piece, {lower ^ 4, rows.piece})
                                          : block(k4 + kEight, halves.piece, {lower, rows.piece});
#pragma unroll
        for (int i = 0; i < kQuarter / 16; ++i) {
          uint32_t a[4];
          ptx::ldmatrix_at(a, next(far_place, i));
          mma<Elem>(far, a, far_right[2 * i], far_right[2 * i + 1]);
          ptx::ldmatrix_at(a, next(low_place, i));
          mma<Elem>(low, a, low_right[2 * i], low_right[2 * i + 1]);
          ptx::ldmatrix_at(a, next(high_place, i));
          mma<Elem>(high, a, high_right[2 * i], high_right[2 * i + 1]);
        }
      }
    }
    // Rows 8-15 with columns 0-7.
    A[0][2] += far[0];
    A[0][3] += far[1];
    M[0][2] += far[2];
    M[0][3] += far[3];
    // Rows 4-7 with columns 0-3 of either half; what other lanes have of these is nothing's.
    if (lane_ >= 16 && lane_ % 4 < 2) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        A[0][i] += low[i];
        M[0][i] += low[2 + i];
        A[1][2 + i] += high[i];
        M[1][2 + i] += high[2 + i];
      }
    }
    // And the tokens of a span with each other.
    const int t = lane_ / 4 % 4;
    if (lane_ / 16 == lane_ % 4 / 2) {
#pragma unroll 1
      for (int quarter = 0; quarter < 4; ++quarter) {
        const int decay = reinterpret_cast<const int*>(&decays)[quarter];
        if (decay == kUsual) continue;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* near = s_.scratch[warp_].near[quarter][lane_ / 16 + 2 * h];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int j = lane_ % 2 * 2 + i;
            if (j >= t) continue;
            A[h][2 * h + i] += near[near_pair(t, j)];
            M[h][2 * h + i] += near[kNearPairs + near_pair(t, j)];
          }
        }
      }
    }
    __syncwarp();  // A takes their place
  }

  // The other blocks that read the turn's chunk, if the block sends any.
  template <class Do>
  __device__ __forceinline__ void for_others(const Turn<Cfg>& turn, const Do& something) const {
    if constexpr (Cfg::kHeads > 1) {
      something(turn.head());
    } else {
#pragma unroll
      for (int rank = 0; rank < Cfg::kReaders; ++rank) {
        if (rank != rank_) something(rank);
      }
    }
  }

  // Copies so many bytes of the chunk to where others read it, whose barriers count them.
  __device__ __forceinline__ void send(const Turn<Cfg>& turn, uint32_t offset, uint32_t bytes,
                                       int rank) const {
    ptx::copy_in_cluster(ptx::address_in(at(&s_.slots[turn.slot()]) + offset, rank),
                         at(&s_.slots[turn.place()]) + offset, bytes,
                         ptx::address_in(at(&s_.full[turn.slot()]), rank));
  }

  __device__ __forceinline__ uint2 load_taken() const {
    return ptx::load_relaxed(&s_.stock.flags->taken);
  }

  // Says, by the thread that copied it, that the part of the last chunk lies in the stock. In the
  // next turn, because a copy takes its time.
  __device__ __forceinline__ void publish() const {
    if (put_ < 0) return;
    ptx::wait_for_copied();
    ptx::add_release(&s_.stock.flags->put[put_ % kStock], 1);
  }

  // The same to the team's stock.
  __device__ __forceinline__ void put(const Turn<Cfg>& turn, uint32_t offset,
                                      uint32_t bytes) const {
    ptx::copy_to_global(reinterpret_cast<char*>(&s_.stock.chunks[turn.chunk() % kStock]) + offset,
                        at(&s_.slots[turn.place()]) + offset, bytes);
  }

  // Sends the factors to other blocks while the squares are made: either warp to one of them.
  __device__ __forceinline__ void send_factors(const Turn<Cfg>& turn, uint2 taken) const {
    if (!sends_chunks<Cfg>(rank_)) return;
    if (cute::elect_one_sync()) {
      constexpr uint32_t kFactors = offsetof(Slot, squares);
      if constexpr (Cfg::kApart) {
        // Until both readers have taken the chunk that lies there.
        const unsigned needed = max(turn.chunk() + 1 - kStock, 0);
        while (min(taken.x, taken.y) < needed) taken = load_taken();
        put(turn, part_ * (kFactors / 2), kFactors / 2);
      } else {
        int i = 0;
        for_others(turn, [&](int rank) {
          if (i++ % 2 != part_) return;
          ptx::mbarrier_expect_in_cluster(ptx::address_in(at(&s_.full[turn.slot()]), rank),
                                          kSlotBytes);
          send(turn, 0, kFactors, rank);
        });
      }
    }
    __syncwarp();
  }

  // Tells the chunk's readers, other blocks by the bytes that they get, or by a flag.
  __device__ __forceinline__ void hand_over(const Turn<Cfg>& turn) const {
    constexpr uint32_t kSquares = offsetof(Slot, squares);
    if constexpr (Cfg::kApart) {
      ptx::fence_async_proxy();
      __syncwarp();
      if (cute::elect_one_sync()) {
        put(turn, kSquares + part_ * sizeof(Squares), sizeof(Squares));
        ptx::wait_for_sent();
      }
      __syncwarp();
      ptx::mbarrier_arrive_at(at(&s_.empty[turn.stage]));
      return;
    }
    // Where there is no chain, the square warps read the slot last of the block's.
    ptx::mbarrier_arrive_at(has_chain<Cfg>(rank_) ? at(&s_.full[turn.slot()])
                                                  : at(&s_.empty[turn.stage]));
    if (!sends_chunks<Cfg>(rank_)) return;
    ptx::fence_async_proxy();
    __syncwarp();
    if (cute::elect_one_sync()) {
      const uint32_t offset = kSquares + part_ * sizeof(Squares);
      for_others(turn, [&](int rank) { send(turn, offset, sizeof(Squares), rank); });
    }
    __syncwarp();
  }

  // rows: the part's tokens inside the sequence, if not more than it has; none may be. `emptied` is
  // done when the raw slot is given back.
  template <class Emptied>
  __device__ __forceinline__ void make(int rows, const Cursor& use, const Turn<Cfg>& turn,
                                       uint32_t beta_bits, const Emptied& emptied) const {
    const Raw& raw = raw_of(use);
    Slot& slot = s_.slots[turn.place()];
    Squares& to = slot.squares[part_];
    Scratch& scratch = s_.scratch[warp_];

    // Looked at now for later, when it will have come.
    const uint2 taken = Cfg::kApart ? load_taken() : uint2{};
    ptx::mbarrier_wait_at(at(&s_.raw_full[use.at]), use.parity);
    // Of eight tokens each: q and, below it, k times k; and times q.
    float by_k[2][4] = {}, by_q[2][4] = {};
    {
      // Lanes 0-7 and 16-23 load rows of q and the others of k, which as a left operand stand below
      // each other; the halves of either, of 8 channels each, are right operands too.
      const Blocks both((lane_ & 8 ? at(raw.k) : at(raw.q)) + part_ * kLateRows,
                        {lane_ & 7, lane_ >> 4});
      constexpr int kEight = 8 * kRowBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kHalf / 16; ++i) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            uint32_t x[4];
            ptx::ldmatrix_at(x, both[i] + half * kTileBytes + h * kEight);
            mma<Elem>(by_k[h], x, x[1], x[3]);
            mma<Elem>(by_q[h], x, x[0], x[2]);
          }
        }
      }
    }
    ptx::mbarrier_arrive_at(at(&s_.norms[use.at][part_]));
    // Factor warps wait only where they are steep; synccheck wants every phase waited for.
    ptx::mbarrier_wait_at(at(&s_.norms[use.at][part_]), use.parity);
    if constexpr (Cfg::kApart) {
      if (cute::elect_one_sync()) publish();
      __syncwarp();
    }
    ptx::mbarrier_wait_at(at(&s_.factors_full[use.at]), use.parity);
    const int4 decays = *reinterpret_cast<const int4*>(s_.decay[use.at][part_]);
    const bool usual = (decays.x | decays.y | decays.z | decays.w) == kUsual;
    if (usual) ptx::mbarrier_arrive_at(at(&s_.raw_empty[use.at]));
    send_factors(turn, taken);
    if (usual) emptied();
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
    float beta = bits_to_float(__shfl_sync(~0u, beta_bits, lane_ % kPart), p_.beta.dtype);
    beta = lane_ % kPart < rows ? fast_beta_activation(beta, p_.beta_mode) : 0.f;
    if (lane_ < kPart) scratch.beta[lane_] = beta;
    __syncwarp();
    if (lane_ < kPart) to.T_diagonal[token_place(lane_)] = scratch.rk[lane_] * beta;

    Square A = {}, M = {}, cross = {};
    if (usual) {
      if (part_ == 0) {
        products<0>(A, M, cross, slot);
      } else {
        products<1>(A, M, cross, slot);
      }
    } else {
      unusual_products(A, M, cross, slot, raw, decays);
      ptx::mbarrier_arrive_at(at(&s_.raw_empty[use.at]));
      emptied();
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
        const int place = square_offset(i, h) + (lane_ % 4) * 4;
        *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(to.M) + place) =
            Traits::pack(j < i ? M[h][2 * r] : 0.f, j + 1 < i ? M[h][2 * r + 1] : 0.f);
        *reinterpret_cast<uint32_t*>(reinterpret_cast<char*>(to.cross) + place) =
            Traits::pack(cross[h][2 * r], cross[h][2 * r + 1]);
      }
    }
    __syncwarp();
    invert_triangle(to.T, scratch.A, scratch.rk, scratch.beta, lane_);
    hand_over(turn);
  }

  const Problem& p_;
  const Work& w_;
  Shared<Cfg>& s_;
  Loader<Cfg> loader_;
  int warp_, lane_;
  int rank_;  // of the block in its team
  int part_;  // of every chunk
  int tokens_;
  int put_ = -1;  // the last chunk that was put into the stock
};

}  // namespace flashkda::cuda::sm90::prefill
