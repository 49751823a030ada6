// The chain warpgroups: they carry the state through the chunks. A warpgroup owns 64 value columns
// and keeps their state transposed, S^T [V, K], in wgmma's accumulators, where it is at once,
// rounded, the left operand of the next chunk's product; nothing of the chain passes through shared
// memory and the warpgroups never wait for each other. `enter` leads to the middle of a chunk,
// about which its factors are, and `leave` to its end. For the early part (1) and the late (2),
// with left factors k', q' and right factors k":
//
//   S  <- diag(enter) S
//   X1 = V1 - diag(rk) k'1 S                         U1 = T1 X1
//   X2 = V2 - diag(rk) (k'2 S + (k'2 k"1^T) U1)      U2 = T2 X2
//   O1 = diag(rq) (q'1 S + M1 U1)
//   O2 = diag(rq) (q'2 S + (q'2 k"1^T) U1 + M2 U2)
//   S  <- diag(leave) (S + k"1^T U1 + k"2^T U2)
//
// all transposed. The products with S and k" are wgmma's, those of 16 x 16 matrices a warp's own.
// The diagonals of T and M multiply in fp32, unrounded.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <type_traits>

#include "../../common/element.cuh"
#include "../../common/state_columns.cuh"
#include "../ptx.cuh"
#include "maps.h"
#include "shared.cuh"
#include "tile.cuh"
#include "turn.cuh"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
class Chain {
  using Elem = __nv_bfloat16;
  using Traits = ElementTraits<Elem>;
  using Major = cute::SM90::GMMA::Major;
  static constexpr bool kRoomy = Cfg::kChainGroups == 1;
  static constexpr bool kLone = Cfg::kMakersOnly;  // nothing else works in its block
  static constexpr int kTiles = kChannels / 8;     // of the accumulator: eight channels each

 public:
  __device__ Chain(const Problem& p, const Maps& maps, const Work& w, Shared<Cfg>& s, int rank,
                   int warp, int lane)
      : p_(p), maps_(maps), w_(w), s_(s), rank_(rank), lane_(lane), warp_(warp) {
    if constexpr (kLone) {
      tokens_ = __shfl_sync(~0u, static_cast<int>(w.tokens), 0);
      zero_ = static_cast<uint32_t>(w.tokens >> 32);
      o_ = static_cast<Elem*>(p.o.ptr) + w.row * p.o.stride_b +
           (w.begin + lane / 2) * p.o.stride_t + w.hv * p.o.stride_h + w.v0 + warp * 16 +
           lane % 2 * 8;
      o_part_ = ptx::opaque(kPart * p.o.stride_t);
    }
  }

  __device__ void run() {
    static_assert(kCheckpointUnit == kPart, "a checkpoint lies between two parts");
    float S[kTiles][4];
    Decays enter;
    load_state(S);
    int left = kLone ? tokens_ : static_cast<int>(w_.tokens);
    if (p_.checkpoints.states.ptr != nullptr && list_checkpoints()) {
      columns().spoil_wrong_checkpoints(p_);
    }
    int stop = first_stop();
    stop = give<0>(S, nullptr, nullptr, left, stop, left == 0);
    int at = 0;
    uint32_t parity = 0;
    constexpr Nothing kNothing;
    const auto next = [&] {
      at = at + 1 == Cfg::kSlots ? 0 : at + 1;
      parity ^= at == 0;
      left -= kChunk;
    };
    if (kLone && left > 0) {  // from then on a step waits for the next one's chunk
      ptx::mbarrier_wait_at(at_of(&s_.full[at]), parity);
      load_decays(enter, s_.slots[at].enter);
    }
    while (left > 0) {
      // Up to the step in or after which the state is wanted. Shuffled, so that the compiler sees
      // that a warpgroup's threads walk together.
      const int bound = __shfl_sync(~0u, max(stop, 0) + kChunk, 0);
#pragma unroll 1
      while (left > bound) {
        // Places are cheaper to find again than to keep.
        if constexpr (!kLone) lane_ = ptx::opaque_lane(lane_);
        step(S, enter, at, parity, left, kNothing, kNothing);
        next();
      }
      const auto inside = [&](const float (&u0)[4], const float (&u1)[4], const uint32_t (&u)[4],
                              const Slot& slot) {
        cute::warpgroup_wait<0>();
        fence(S);
        if (stop != left - kPart) return;
        uint32_t rest[1][4];
        round_off(rest[0], u0, u1, u);
        stop = give<1>(S, rest, &slot, stop, stop, false);
      };
      const auto end = [&](const auto& d, const uint32_t (&u)[4], const uint32_t (&u_late)[4],
                           const Slot& slot) {
        cute::warpgroup_wait<0>();
        fence(S);
        uint32_t rest[2][4];
        round_off(rest[0], d[0], d[1], u);
        round_off(rest[1], d[2], d[3], u_late);
        stop = give<2>(S, rest, &slot, left - kChunk, stop, left <= kChunk);
      };
      step(S, enter, at, parity, left, inside, end);
      next();
      // Found anew, lest the loop above lack the registers that storing a state takes.
      parity = (static_cast<uint32_t>(w_.tokens) - left) / (kChunk * Cfg::kSlots) & 1;
    }
    if (w_.tokens == 0) return;
    if (left == 0 && !kLone) {
      send_outputs(left);
      ptx::wait_for_sent();
    } else {
      store_outputs(left + kChunk);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t at_of(const void* part) {
    return ptx::smem_address(part);
  }

  static __device__ __forceinline__ void scale(float (&x)[4], float even, float odd) {
    x[0] *= even;
    x[1] *= odd;
    x[2] *= even;
    x[3] *= odd;
  }

  // Found again where it is needed: the steps lack registers.
  __device__ __forceinline__ StateColumns<kChannels> columns() const {
    return {static_cast<int>(w_.n), static_cast<int>(w_.tokens), w_.hv, w_.v0 + warp_ * 16, lane_};
  }

  // A loop for every dtype and layout: all loads are under way before the first is waited for.
  __device__ __forceinline__ void load_state(float (&S)[kTiles][4]) const {
    const StateTensor& x = p_.initial_state;
    const int64_t row = first_row(p_, w_.n);
    const auto fill = [&](const auto& element) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) S[t][i] = element(8 * t + i % 2, i / 2 * 8);
      }
    };
    if (row < 0) return fill([&](int, int) { return first_value(row); });
    const auto fill_from = [&](const auto* states, const auto& to_float) {
      const auto* const from = states + row * x.stride_n + columns().place(p_, 0, 0);
      if (p_.state_v_first) {
        fill([&](int d, int c) { return to_float(from[c * kChannels + d]); });
      } else {
        fill([&](int d, int c) { return to_float(from[d * kChannels + c]); });
      }
    };
    if (x.dtype == DType::kF32) {
      fill_from(static_cast<const float*>(x.ptr), [](float y) { return y; });
    } else {
      fill_from(static_cast<const Elem*>(x.ptr), [](Elem y) { return __bfloat162float(y); });
    }
  }

  // What is done inside and at the end of a step in which no state is wanted.
  struct Nothing {
    template <class... X>
    __device__ __forceinline__ void operator()(const X&...) const {}
  };
  // Such a step is not the sequence's last: its chunk is a whole one, and there is a next one.
  template <class Inside>
  static constexpr bool kWithin = std::is_same_v<Inside, Nothing>;

  // What `list_checkpoints` has found, and the rest from global memory.
  struct FoundCheckpoints {
    const Chain& chain;

    __device__ __forceinline__ int unit(int c) const {
      if (c < kListed) return chain.s_.checkpoints[c].unit;
      return checkpoint_unit(chain.p_, chain.w_.n, chain.w_.tokens, c);
    }
    __device__ __forceinline__ int64_t row(int c) const {
      if (c < kListed) return chain.s_.checkpoints[c].row;
      return checkpoint_row(chain.p_, chain.w_.n, c);
    }
    __device__ __forceinline__ int64_t intervals_before() const {
      return chain.s_.checkpoints[0].row;
    }
  };

  // While the first chunk is being made. Returns whether any offset is wrong.
  __device__ __forceinline__ bool list_checkpoints() const {
    const Checkpoints& x = p_.checkpoints;
    if (warp_ == 0) {
      bool wrong = false;
      if (x.interval > 0) {
        s_.checkpoints[lane_].row = intervals_before<uint32_t>(p_, w_.n, lane_);
      } else {
#pragma unroll 1
        for (int first = 0; first < x.C; first += 32) {
          const int c = min(first + lane_, x.C - 1);
          const ListedCheckpoint found = {checkpoint_row(p_, w_.n, c),
                                          checkpoint_unit(p_, w_.n, w_.tokens, c)};
          if (first == 0) s_.checkpoints[lane_] = found;
          wrong |= found.unit == kWrongCheckpoint;
        }
      }
      s_.wrong_checkpoints = __any_sync(~0u, wrong);
    }
    ptx::barrier_sync(1, Cfg::kChainGroups * kGroupThreads);
    return s_.wrong_checkpoints;
  }

  // With how much left the first checkpoint lies, or the next one. Which it is, is kept in shared
  // memory, because registers are scarce; one lane's alone, so that no other may read what the next
  // has taken the place of.
  __device__ __forceinline__ int stop_at(const Checkpoint& x) const {
    if (lane_ == 0) s_.stops[warp_] = x.c;
    return columns().left_at(x.unit);
  }
  __device__ __forceinline__ int first_stop() const {
    if (p_.checkpoints.states.ptr == nullptr) return INT_MIN;
    return stop_at(first_checkpoint(p_, FoundCheckpoints{*this}, w_.tokens, kBeforeAll, lane_));
  }
  __device__ __forceinline__ int stop_after(const Checkpoint& x) const {
    return stop_at(next_checkpoint(p_, FoundCheckpoints{*this}, w_.tokens, x, lane_));
  }

  using Decays = float4[kTiles / 2];  // of the lane's channels, in two tiles each

  __device__ __forceinline__ const float4* decays_of(const float (&from)[kDecayStride * 4]) const {
    return reinterpret_cast<const float4*>(from + lane_ % 4 * kDecayStride);
  }

  __device__ __forceinline__ void load_decays(Decays& to,
                                              const float (&from)[kDecayStride * 4]) const {
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) to[n] = decays_of(from)[n];
  }

  static __device__ __forceinline__ void decay(float (&S)[kTiles][4], const Decays& by) {
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) {
      scale(S[2 * n], by[n].x, by[n].y);
      scale(S[2 * n + 1], by[n].z, by[n].w);
    }
  }

  template <int n>
  static __device__ __forceinline__ void fence(float (&x)[n][4]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) cute::warpgroup_fence_operand(x[i][j]);
    }
  }

  // Of 16 channels, the kk-th of them, from `rows` bytes into a half tile on.
  static __device__ __forceinline__ uint64_t left_factors(uint32_t tiles, uint32_t rows, int kk) {
    constexpr uint32_t kHalfTile = sizeof(Slot::left[0]);
    return make_descriptor(
        tiles + (offsetof(Slot, left) + rows + kk / 4 * kHalfTile) / kPiece + kk % 4 * 2, 0);
  }

  // d = S^T left^T: tiles 0 to 3 are k' S, tiles 4 to 7 q' S. tiles: the slot's, for descriptors.
  __device__ __forceinline__ void start_state_product(float (&d)[8][4], const float (&S)[kTiles][4],
                                                      uint32_t tiles) const {
    using Product = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_RS<Major::K, Major::K>;
    uint32_t a[kTiles / 2][4];
#pragma unroll
    for (int kk = 0; kk < kTiles / 2; ++kk) to_operand<Elem>(a[kk], S[2 * kk], S[2 * kk + 1]);
    cute::warpgroup_arrive();
#pragma unroll
    for (int kk = 0; kk < kTiles / 2; ++kk) {
      const uint64_t b = left_factors(tiles, 0, kk);
#define FLASHKDA_TILE(n) d[n][0], d[n][1], d[n][2], d[n][3]
      Product::fma(a[kk][0], a[kk][1], a[kk][2], a[kk][3], b, FLASHKDA_TILE(0), FLASHKDA_TILE(1),
                   FLASHKDA_TILE(2), FLASHKDA_TILE(3), FLASHKDA_TILE(4), FLASHKDA_TILE(5),
                   FLASHKDA_TILE(6), FLASHKDA_TILE(7),
                   kk == 0 ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One);
#undef FLASHKDA_TILE
    }
    cute::warpgroup_commit_batch();
  }

  // S^T += U^T right, of a part.
  __device__ __forceinline__ void start_update(float (&S)[kTiles][4], const uint32_t (&u)[4],
                                               uint32_t tiles, int part) const {
    using Product = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>;
    const uint64_t b = make_descriptor(tiles + (offsetof(Slot, right) + part * kLateRows) / kPiece,
                                       sizeof(Slot::right[0]));
    fence(S);
    cute::warpgroup_arrive();
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
  template <class Inside>
  __device__ __forceinline__ void keep_tokens(uint32_t (&v)[4], uint32_t (&v_late)[4],
                                              int left) const {
    if (kWithin<Inside> || left >= kChunk) return;
    keep_tokens(v, left);
    keep_tokens(v_late, left - kPart);
  }
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
  __device__ __forceinline__ float4 of_tokens(const float (&x)[kPart]) const {
    return reinterpret_cast<const float4*>(x)[lane_ % 4];
  }

  static __device__ __forceinline__ uint32_t bits(float x) { return __float_as_uint(x); }
  static __device__ __forceinline__ uint32_t bits(const Decays& x) {
    uint32_t all = 0;
#pragma unroll
    for (int n = 0; n < kTiles / 2; ++n) all |= bits(x[n].x);
    return all;
  }

  // Tells who fills the slot. last: what was read of the slot last, and is not
  // used before this. Decays have no sign, so that it only delays the address.
  __device__ __forceinline__ void release(int slot, const Decays& last) const {
    const uint32_t all = bits(last);
    const Maker maker = maker_of<Cfg>(slot, rank_);
    const uint32_t empty = at_of(&s_.empty[Cfg::kApart ? slot : maker.stage]) + (all >> 31);
    if constexpr (Cfg::kCluster > 1) {
      ptx::mbarrier_arrive_in_cluster(ptx::address_in(empty, maker.rank));
    } else {
      ptx::mbarrier_arrive_at(empty);
    }
  }

  __device__ __forceinline__ void load_square(uint32_t (&m)[4],
                                              const Elem (&from)[kPart * kPart]) const {
    const LanePosition place = by_column(lane_);
    ptx::ldmatrix_at(m, at_of(from) + square_offset(place.row, place.piece));
  }

  // d += m u, all transposed.
  static __device__ __forceinline__ void multiply(float (&d0)[4], float (&d1)[4],
                                                  const uint32_t (&u)[4], const uint32_t (&m)[4]) {
    mma<Elem>(d0, u, m[0], m[1]);
    mma<Elem>(d1, u, m[2], m[3]);
  }

  // What leads from k S to U, of a part.
  struct Solving {
    float4 rk, diagonal;
    uint32_t T[4];
  };

  __device__ __forceinline__ void load(Solving& to, const Squares& from) const {
    to.rk = of_tokens(from.rk);
    to.diagonal = of_tokens(from.T_diagonal);
    load_square(to.T, from.T);
  }

  // k S, in two tiles, becomes X and then, unrounded, U, of a part.
  static __device__ __forceinline__ void solve(float (&d0)[4], float (&d1)[4],
                                               const uint32_t (&v)[4], const Solving& by) {
    const auto subtract = [](float (&d)[4], uint32_t lower_bits, uint32_t upper_bits, float even,
                             float odd) {
      const float2 lower = Traits::unpack(lower_bits), upper = Traits::unpack(upper_bits);
      d[0] = lower.x - even * d[0];
      d[1] = lower.y - odd * d[1];
      d[2] = upper.x - even * d[2];
      d[3] = upper.y - odd * d[3];
    };
    subtract(d0, v[0], v[2], by.rk.x, by.rk.y);
    subtract(d1, v[1], v[3], by.rk.z, by.rk.w);
    uint32_t x[4];
    to_operand<Elem>(x, d0, d1);
    scale(d0, by.diagonal.x, by.diagonal.y);
    scale(d1, by.diagonal.z, by.diagonal.w);
    multiply(d0, d1, x, by.T);
  }

  // Stores the state where it is wanted with `left` to go: in the checkpoints that lie there, if
  // that is the stop, and as the final state. Returns the next stop. rest: by parts that are in S,
  // what rounding took of their U. Where decay is fast, the last tokens are most of a state, and
  // the rounding of their U half of its error; the chain goes on without it. S is not yet decayed
  // from the chunk's middle to its end, if it has come there.
  template <int kParts>
  __device__ __forceinline__ int give(const float (&S)[kTiles][4], const uint32_t (*rest)[4],
                                      const Slot* slot, int left, int stop, bool last) const {
    while (stop == left || last) {
      const bool kept = stop == left;
      const Checkpoint at = {columns().unit_at(left),
                             __shfl_sync(~0u, lane_ == 0 ? s_.stops[warp_] : 0, 0)};
      const int64_t row =
          kept ? row_of(p_, FoundCheckpoints{*this}, at.c) : last_row(p_, w_.n, w_.tokens);
      const StateTensor& to = kept ? p_.checkpoints.states : p_.final_state;
      if (row >= 0) store_state<kParts>(S, rest, slot, to, row);
      last = last && kept;
      if (kept) stop = stop_after(at);
    }
    return stop;
  }

  // Straight loops of few instructions: a sequence comes here once or twice, and what is not in the
  // instruction cache takes longer to fetch than to do. Three of them: with four the assembler no
  // longer knows, in Threes, that the warps of other roles walk together, and their code is slower.
  template <int kParts>
  __device__ __forceinline__ void store_state(const float (&S)[kTiles][4],
                                              const uint32_t (*rest)[4], const Slot* slot,
                                              const StateTensor& to, int64_t row) const {
    const int lane = ptx::opaque_lane(lane_);
    // put(at, d): two tiles of 8 channels each; the first two are at `at`, and the next `stride`
    // after them.
    const auto store_tiles = [&](auto* at, int stride, const auto& put) {
      float d[2][2][4];
      const auto find = [&](int n) {
        auto& x = d[n % 2];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[0][i] = S[2 * n][i], x[1][i] = S[2 * n + 1][i];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          add_product(x[0], x[1], rest[part], *slot, part, n);
        }
        if constexpr (kParts == 2) {
          const float4 by = decays_of(slot->leave)[n];
          scale(x[0], by.x, by.y);
          scale(x[1], by.z, by.w);
        }
      };
      find(0);
#pragma unroll
      for (int n = 0; n < kTiles / 2; ++n) {
        if (n + 1 < kTiles / 2) find(n + 1);  // products in the shadow of the stores
        put(at + n * stride, d[n % 2]);
      }
    };
    const bool v_first = p_.state_v_first;
    const int first = w_.v0 + warp_ * 16;
    const int64_t begin =
        row * to.stride_n + w_.hv * (kChannels * kChannels) + first * (v_first ? kChannels : 1);
    // Lanes next to each other exchange what they have, so that what a lane then has lies together
    // and a store of the warp writes whole sectors.
    const bool second = lane % 2 != 0;
    const auto exchange = [&](auto& x, auto& y) {
      const auto received = __shfl_xor_sync(~0u, second ? x : y, 1);
      (second ? x : y) = received;
    };
    if (to.dtype == DType::kF32) {
      float* const states = static_cast<float*>(to.ptr) + begin;
      if (v_first) {
        store_tiles(states + lane / 4 * kChannels + lane % 4 * 2, 16,
                    [&](float* at, const float (&d)[2][4]) {
#pragma unroll
                      for (int i = 0; i < 2; ++i) {
                        at[8 * i] = d[i][0];
                        at[8 * i + 1] = d[i][1];
                        at[8 * kChannels + 8 * i] = d[i][2];
                        at[8 * kChannels + 8 * i + 1] = d[i][3];
                      }
                    });
      } else {
        // Four channels of a column.
        store_tiles(states + lane % 4 / 2 * 4 * kChannels + lane / 4 + lane % 2 * 8, 16 * kChannels,
                    [&](float* at, float (&d)[2][4]) {
#pragma unroll
                      for (int i = 0; i < 2; ++i) {
                        exchange(d[i][0], d[i][2]);
                        exchange(d[i][1], d[i][3]);
                        at[8 * i * kChannels] = d[i][0];
                        at[(8 * i + 1) * kChannels] = d[i][1];
                        at[(8 * i + 2) * kChannels] = d[i][2];
                        at[(8 * i + 3) * kChannels] = d[i][3];
                      }
                    });
      }
      return;
    }
    Elem* const states = static_cast<Elem*>(to.ptr) + begin;
    // A pool's rows may begin anywhere.
    const bool odd = reinterpret_cast<uintptr_t>(states) % 8 != 0;
    // Four neighbours in memory: a lane has two channels of a column, and those next to it the next
    // ones; where columns are neighbours, a tile is turned first.
    const auto put_four = [&](Elem* at, uint32_t x, uint32_t y) {
      exchange(x, y);
      if (odd) {
        uint16_t* const to = reinterpret_cast<uint16_t*>(at);
        to[0] = static_cast<uint16_t>(x);
        to[1] = static_cast<uint16_t>(x >> 16);
        to[2] = static_cast<uint16_t>(y);
        to[3] = static_cast<uint16_t>(y >> 16);
      } else {
        *reinterpret_cast<uint2*>(at) = make_uint2(x, y);
      }
    };
    store_tiles(states + lane / 4 * kChannels + lane % 4 / 2 * 4 + lane % 2 * 8,
                v_first ? 16 : 16 * kChannels, [&](Elem* at, const float (&d)[2][4]) {
                  uint32_t x[2][2];  // by tiles and columns
#pragma unroll
                  for (int i = 0; i < 2; ++i) {
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                      const uint32_t packed = Traits::pack(d[i][2 * j], d[i][2 * j + 1]);
                      const uint32_t turned = ptx::movmatrix_trans(packed);
                      x[i][j] = v_first ? packed : turned;
                    }
                  }
                  put_four(at, x[0][0], v_first ? x[1][0] : x[0][1]);
                  put_four(at + 8 * kChannels, v_first ? x[0][1] : x[1][0], x[1][1]);
                });
  }

  // The n-th two of the tiles.
  __device__ __forceinline__ void add_product(float (&d0)[4], float (&d1)[4],
                                              const uint32_t (&rest)[4], const Slot& slot, int part,
                                              int n) const {
    const LanePosition rows = by_row(lane_);
    uint32_t b[4];
    ptx::ldmatrix_trans_at(
        b, at_of(slot.right[n / 4]) + row_offset(part * kPart + rows.row, n % 4 * 2 + rows.piece));
    mma<Elem>(d0, rest, b[0], b[1]);
    mma<Elem>(d1, rest, b[2], b[3]);
  }

  // What is left of two tiles that have been rounded to an operand.
  __device__ __forceinline__ void round_off(uint32_t (&rest)[4], const float (&d0)[4],
                                            const float (&d1)[4],
                                            const uint32_t (&rounded)[4]) const {
    const auto less = [](float x, float y, uint32_t rounded) {
      const float2 r = Traits::unpack(rounded);
      return Traits::pack(x - r.x, y - r.y);
    };
    rest[0] = less(d0[0], d0[1], rounded[0]);
    rest[1] = less(d0[2], d0[3], rounded[1]);
    rest[2] = less(d1[0], d1[1], rounded[2]);
    rest[3] = less(d1[2], d1[3], rounded[3]);
  }

  // And from q S + M U to O.
  struct Finishing {
    float4 diagonal, rq;
  };

  __device__ __forceinline__ void load(Finishing& to, const Squares& from) const {
    to.diagonal = of_tokens(from.M_diagonal);
    to.rq = of_tokens(from.rq);
  }

  // q S + M U but for M's diagonal becomes O, of a part.
  __device__ __forceinline__ void finish_output(float (&d0)[4], float (&d1)[4],
                                                const float (&u0)[4], const float (&u1)[4],
                                                const Finishing& by, int part) const {
    const auto finish = [](float (&d)[4], const float (&u)[4], float even, float odd, float even_rq,
                           float odd_rq) {
      d[0] += even * u[0];
      d[1] += odd * u[1];
      d[2] += even * u[2];
      d[3] += odd * u[3];
      scale(d, even_rq, odd_rq);
    };
    finish(d0, u0, by.diagonal.x, by.diagonal.y, by.rq.x, by.rq.y);
    finish(d1, u1, by.diagonal.z, by.diagonal.w, by.rq.z, by.rq.w);
    ptx::stmatrix_trans_at(
        at_of(s_.o[warp_][part]) + square_offset((lane_ & 7) + (lane_ >> 4) * 8, (lane_ >> 3) & 1),
        Traits::pack(d0[0], d0[1]), Traits::pack(d0[2], d0[3]), Traits::pack(d1[0], d1[1]),
        Traits::pack(d1[2], d1[3]));
  }

  __device__ __forceinline__ void load_values(uint32_t (&v)[4], int at, int part) const {
    __builtin_assume(warp_ >= 0);
    const LanePosition rows = by_row(lane_);
    ptx::ldmatrix_trans_at(v, at_of(s_.values[at].v[warp_ / 4]) + part * kLateRows +
                                  (row_offset(rows.row, rows.piece) ^ warp_ % 4 * 2 * kPiece));
  }

  // One chunk. `inside` is done when the early part's update has been started, `end` when both
  // parts' have. ahead: what a lone chain has loaded of it.
  template <class Inside, class End>
  __device__ __forceinline__ void step(float (&S)[kTiles][4], Decays& ahead, int at,
                                       uint32_t parity, int left, const Inside& inside,
                                       const End& end) {
    const Slot& slot = s_.slots[at];
    // Shuffled, so that descriptors stay in uniform registers.
    const uint32_t tiles = __shfl_sync(~0u, descriptor_address(at_of(&slot)), 0);
    if constexpr (kLone) {
      return lone_step(S, ahead, tiles, at, parity, left, inside, end);
    }
    ptx::mbarrier_wait_at(at_of(&s_.full[at]), parity);
    {
      Decays enter;
      load_decays(enter, slot.enter);
      decay(S, enter);
    }
    float d[8][4];
    start_state_product(d, S, tiles);
    send_outputs(left);
    uint32_t u[4], u_late[4];
    Decays leave;
    if constexpr (kRoomy) {
      solve_ahead(S, d, u, u_late, leave, slot, tiles, at, left, inside);
    } else {
      solve_in_turn(S, d, u, u_late, slot, tiles, at, left, inside);
    }
    end(d, u, u_late, slot);
    // Not before: what a state is stored with would be put away meanwhile.
    if constexpr (!kRoomy) load_decays(leave, slot.leave);
    cute::warpgroup_wait<0>();
    fence(S);
    release(at, leave);
    decay(S, leave);
  }

  // From the products with the state to the outputs and the updates of the state, by warps that
  // others' work lets wait: each operand is loaded shortly before it is used.
  template <class Inside>
  __device__ __forceinline__ void solve_in_turn(float (&S)[kTiles][4], float (&d)[8][4],
                                                uint32_t (&u)[4], uint32_t (&u_late)[4],
                                                const Slot& slot, uint32_t tiles, int at, int left,
                                                const Inside& inside) const {
    const Squares &early = slot.squares[0], &late = slot.squares[1];
    uint32_t v[4], v_late[4], m[4];
    load_values(v, at, 0);
    cute::warpgroup_wait<0>();
    fence(d);
    load_values(v_late, at, 1);
    keep_tokens<Inside>(v, v_late, left);
    Solving solving;
    load(solving, early);
    solve(d[0], d[1], v, solving);
    to_operand<Elem>(u, d[0], d[1]);
    start_update(S, u, tiles, 0);
    inside(d[0], d[1], u, slot);
    load_square(m, late.cross);
    multiply(d[2], d[3], u, m);
    load_square(m, early.cross);
    multiply(d[6], d[7], u, m);
    load(solving, late);
    solve(d[2], d[3], v_late, solving);
    to_operand<Elem>(u_late, d[2], d[3]);
    start_update(S, u_late, tiles, 1);
    ptx::mbarrier_arrive_at(at_of(&s_.values_empty[at]));
    ptx::wait_for_sent();
    __syncwarp();  // the last outputs have been read
    Finishing finishing;
    load(finishing, early);
    load_square(m, early.M);
    multiply(d[4], d[5], u, m);
    finish_output(d[4], d[5], d[0], d[1], finishing, 0);
    load(finishing, late);
    load_square(m, late.M);
    multiply(d[6], d[7], u_late, m);
    finish_output(d[6], d[7], d[2], d[3], finishing, 1);
  }

  // The same by warps that have a scheduler almost for themselves, and registers to load ahead:
  // all small products go before the updates, which would keep the tensor cores from them.
  template <class Inside>
  __device__ __forceinline__ void solve_ahead(float (&S)[kTiles][4], float (&d)[8][4],
                                              uint32_t (&u)[4], uint32_t (&u_late)[4],
                                              Decays& leave, const Slot& slot, uint32_t tiles,
                                              int at, int left, const Inside& inside) const {
    const Squares &early = slot.squares[0], &late = slot.squares[1];
    uint32_t v[4], v_late[4], cross[4], cross_q[4], M[4], M_late[4];
    load_values(v, at, 0);
    Solving solving, solving_late;
    load(solving, early);
    load_values(v_late, at, 1);
    cute::warpgroup_wait<0>();
    fence(d);
    keep_tokens<Inside>(v, v_late, left);
    load_square(cross, late.cross);
    load(solving_late, late);
    solve(d[0], d[1], v, solving);
    load_square(cross_q, early.cross);
    load_square(M, early.M);
    load_square(M_late, late.M);
    to_operand<Elem>(u, d[0], d[1]);
    multiply(d[2], d[3], u, cross);
    multiply(d[6], d[7], u, cross_q);
    multiply(d[4], d[5], u, M);
    load_decays(leave, slot.leave);
    solve(d[2], d[3], v_late, solving_late);
    ptx::mbarrier_arrive_at(at_of(&s_.values_empty[at]));
    to_operand<Elem>(u_late, d[2], d[3]);
    multiply(d[6], d[7], u_late, M_late);
    start_update(S, u, tiles, 0);
    inside(d[0], d[1], u, slot);
    start_update(S, u_late, tiles, 1);
    Finishing finishing, finishing_late;
    load(finishing, early);
    load(finishing_late, late);
    ptx::wait_for_sent();
    __syncwarp();  // the last outputs have been read
    finish_output(d[4], d[5], d[0], d[1], finishing, 0);
    finish_output(d[6], d[7], d[2], d[3], finishing_late, 1);
  }

  // The same by a chain that nothing keeps from issuing (lone_step.cuh). enter: the chunk's, and
  // then the next one's.
  template <class Inside, class End>
  __device__ __forceinline__ void lone_step(float (&S)[kTiles][4], Decays& enter, uint32_t tiles,
                                            int at, uint32_t parity, int left, const Inside& inside,
                                            const End& end);
  __device__ __forceinline__ void start_state_products(float (&x)[4][4], float (&y)[4][4],
                                                       const float (&S)[kTiles][4], uint32_t tiles,
                                                       const uint32_t (&loaded)[4]) const;
  __device__ __forceinline__ void load_outputs(uint4 (&o)[2]) const;
  __device__ __forceinline__ void put_outputs(const uint4 (&o)[2], bool any);

  // x, but not before y is known: orders what the assembler would order otherwise.
  template <class X>
  __device__ __forceinline__ X after(X x, uint32_t y) const {
    return x | static_cast<X>(y & zero_);
  }

  // Has the copy engine take O of the chunk, a whole one, before that with `left` to go, if there
  // is one.
  __device__ __forceinline__ void send_outputs(int left) const {
    ptx::fence_async_proxy();
    __syncwarp();  // they have been written
    if (cute::elect_one_sync()) {
      const Origin& x = s_.origins[0];
      const int done = static_cast<int>(w_.tokens) - left;
      if (done > 0) {
        ptx::send_box(&maps_.o, at_of(s_.o[warp_]), warp_ % 4 * 16, x.begin + done - kChunk,
                      x.half + warp_ / 4, x.hv, x.row);
      }
    }
  }

  // The lane's half of a row of what is staged.
  __device__ __forceinline__ const uint4& staged_output(int row) const {
    return *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(s_.o[warp_]) +
                                           square_offset(row, lane_ % 2));
  }

  // The same of a chunk of which `rows` tokens are the sequence's.
  __device__ __forceinline__ void store_outputs(int rows) const {
    __syncwarp();  // they have been written
    Elem* const o = static_cast<Elem*>(p_.o.ptr) + w_.row * p_.o.stride_b +
                    (w_.begin + w_.tokens - rows) * p_.o.stride_t + w_.hv * p_.o.stride_h + w_.v0 +
                    warp_ * 16;
    for (int row = lane_ / 2; row < rows; row += kPart) {
      reinterpret_cast<uint4*>(o + row * p_.o.stride_t)[lane_ % 2] = staged_output(row);
    }
  }

  const Problem& p_;
  const Maps& maps_;
  const Work& w_;
  Shared<Cfg>& s_;
  int rank_;  // of the block in its team
  int lane_;
  int warp_;  // of all chain warps: 16 value columns each
  // Of a lone chain alone.
  int tokens_;      // of the sequence, and known to be the same in all lanes
  uint32_t zero_;   // 0, and not known to be that
  Elem* o_;         // where the lane stores its piece of the next chunk's early part
  int64_t o_part_;  // from there to the late part's
};

}  // namespace flashkda::cuda::sm90::prefill
