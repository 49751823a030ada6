// A chain's step where its block does nothing else (Fed, Apart, Ample): its warps are alone on
// their schedulers, so that what takes the time is each latency that no other covers. What the
// profiles showed of these (docs/performance.md, version 22):
//
// * What is loaded from shared memory while a `wgmma` is under way comes when that is done. Loads
//   therefore stand before the products, or between these and the updates; k' S is a product of its
//   own and comes first, and the updates wait for all that the small products still need.
// * The assembler orders by latencies that it assumes. `after` makes an operand that is needed
//   depend on what has to come before it.
// * A fence for the copy engine takes as long as the `wgmma` under way: outputs go from shared
//   memory through registers, a chunk later.
#pragma once

#include "chain.cuh"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
template <class Inside, class End>
__device__ __forceinline__ void Chain<Cfg>::lone_step(float (&S)[kTiles][4], Decays& enter,
                                                      uint32_t tiles, int at, uint32_t parity,
                                                      int left, const Inside& inside,
                                                      const End& end) {
  const Slot& slot = s_.slots[at];
  const Squares &early = slot.squares[0], &late = slot.squares[1];
  const int next = at + 1 == Cfg::kSlots ? 0 : at + 1;
  const bool more = kWithin<Inside> || left > kChunk;
  const uint32_t full = at_of(&s_.full[next]), full_parity = parity ^ (next == 0);
  const bool there = !more || ptx::mbarrier_passed_at(full, full_parity);

  uint32_t v[4], v_late[4], cross[4], cross_q[4], M[4], M_late[4];
  Solving solving, solving_late;
  load_values(v, at, 0);
  load(solving, early);
  load_square(cross, late.cross);
  load_values(v_late, at, 1);
  load(solving_late, late);
  load_square(M, early.M);
  load_square(cross_q, early.cross);
  load_square(M_late, late.M);
  decay(S, enter);
  float d[4][4], o[4][4];
  const uint32_t loaded[4] = {M_late[3], cross_q[3], v_late[3], solving_late.T[3]};
  start_state_products(d, o, S, tiles, loaded);
  cute::warpgroup_wait<1>();
  fence(d);
  keep_tokens<Inside>(v, v_late, left);
  uint32_t u[4], u_late[4];
  solve(d[0], d[1], v, solving);
  to_operand<Elem>(u, d[0], d[1]);
  multiply(d[2], d[3], u, cross);
  cute::warpgroup_wait<0>();
  fence(o);
  Finishing finishing, finishing_late;
  Decays leave;
  uint4 staged[2];
  load(finishing, early);
  load(finishing_late, late);
  load_decays(leave, slot.leave);
  load_outputs(staged);
  multiply(o[0], o[1], u, M);
  multiply(o[2], o[3], u, cross_q);
  solve(d[2], d[3], v_late, solving_late);
  to_operand<Elem>(u_late, d[2], d[3]);
  multiply(o[2], o[3], u_late, M_late);
  if constexpr (kWithin<Inside>) {
    u[0] = after(u[0], bits(o[3][3]));
    u[1] = after(u[1], bits(leave[kTiles / 2 - 1].x));
    u[2] = after(u[2], bits(finishing_late.rq.x));
  }
  start_update(S, u, tiles, 0);
  inside(d[0], d[1], u, slot);
  start_update(S, u_late, tiles, 1);
  end(d, u, u_late, slot);
  ptx::mbarrier_arrive_at(at_of(&s_.values_empty[at]));
  put_outputs(staged, left != tokens_);
  finish_output(o[0], o[1], d[0], d[1], finishing, 0);
  finish_output(o[2], o[3], d[2], d[3], finishing_late, 1);
  if (!there) ptx::mbarrier_wait_at(full, full_parity);
  cute::warpgroup_wait<0>();
  fence(S);
  if (more) load_decays(enter, s_.slots[next].enter);
  release(at, leave);
  decay(S, leave);
}

// x = S^T k'^T, y = S^T q'^T, not before all of `loaded` is there: what is not loaded by then would
// have to wait for both.
template <class Cfg>
__device__ __forceinline__ void Chain<Cfg>::start_state_products(
    float (&x)[4][4], float (&y)[4][4], const float (&S)[kTiles][4], uint32_t tiles,
    const uint32_t (&loaded)[4]) const {
  using Product = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_RS<Major::K, Major::K>;
  constexpr int kSteps = kTiles / 2;
  uint32_t a[kSteps][4];
#pragma unroll
  for (int kk = 0; kk < kSteps; ++kk) {
    to_operand<Elem>(a[kk], S[2 * kk], S[2 * kk + 1]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kk == kSteps - 1) a[kk][i] = after(a[kk][i], loaded[i]);
      // Without it the assembler lets each product wait for the one before.
      cute::warpgroup_fence_operand(a[kk][i]);
    }
  }
  cute::warpgroup_arrive();
  const auto start = [&](float (&d)[4][4], uint32_t rows) {
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) {
      const uint64_t b = left_factors(tiles, rows, kk);
#define FLASHKDA_TILE(n) d[n][0], d[n][1], d[n][2], d[n][3]
      Product::fma(a[kk][0], a[kk][1], a[kk][2], a[kk][3], b, FLASHKDA_TILE(0), FLASHKDA_TILE(1),
                   FLASHKDA_TILE(2), FLASHKDA_TILE(3),
                   kk == 0 ? cute::SM90::GMMA::ScaleOut::Zero : cute::SM90::GMMA::ScaleOut::One);
#undef FLASHKDA_TILE
    }
    cute::warpgroup_commit_batch();
  };
  start(x, 0);
  start(y, kTileBytes);
}

// O of the chunk before, of which each lane takes half a row of either part.
template <class Cfg>
__device__ __forceinline__ void Chain<Cfg>::load_outputs(uint4 (&o)[2]) const {
  __syncwarp();  // they have been written
#pragma unroll
  for (int part = 0; part < 2; ++part) o[part] = staged_output(lane_ / 2 + part * kPart);
}

template <class Cfg>
__device__ __forceinline__ void Chain<Cfg>::put_outputs(const uint4 (&o)[2], bool any) {
  ptx::store_if(any, o_, o[0]);
  ptx::store_if(any, o_ + o_part_, o[1]);
  o_ += any ? 2 * o_part_ : 0;
  __syncwarp();  // and read
}

}  // namespace flashkda::cuda::sm90::prefill
