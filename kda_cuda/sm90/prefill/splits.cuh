// Where the decay within a part is too steep for the usual factors: what factor warps and square
// warps agree on.
#pragma once

#include "../../common/params.h"
#include "../ptx.cuh"
#include "shared.cuh"

namespace flashkda::cuda::sm90::prefill {

// kSteep: a quarter's right factors about the part's middle lie in rows of 128 bytes from `offset`
// of Raw::g on, their first piece being `piece`. Gates of 16 bits leave the second half of g free,
// which takes tiles like k's; fp32 ones leave each quarter only its own room.
struct SteepRight {
  int offset, piece;
};

__device__ __forceinline__ SteepRight steep_right(DType gate, int quarter) {
  constexpr int kTile = kPart * kRowBytes;
  return gate == DType::kF32 ? SteepRight{quarter * kTile, 0}
                             : SteepRight{(2 + quarter / 2) * kTile, quarter % 2 * 4};
}

// kSplits: at level n, tokens in the upper half of a block of 2 n meet those in its lower half,
// with the decay split at the middle of the block, so that both parts are products of numbers <= 1.
// A factor warp writes k and q times theirs where k and q were, the square warp multiplies, and
// they meet before and after, at a barrier of the square warp's raw slot and the quarter. Neither
// can be a phase ahead of the other, and every use takes an even number of phases.
inline constexpr int kMeetingThreads = 2 * 32;

__device__ __forceinline__ void meet(uint32_t barrier, uint32_t parity) {
  ptx::mbarrier_arrive_at(barrier);
  ptx::mbarrier_wait_together_at(barrier, parity);
}

}  // namespace flashkda::cuda::sm90::prefill
