// Where the decay of a quarter of the channels over a part is too steep for factors about one
// token: what factor warps and square warps agree on. The products of tokens i > j need exp(G_i -
// G_j), which is split where i and j part ways, so that either side is a product of numbers <= 1:
//
//   8 tokens   8-15 with 0-7, split at the part's middle
//   4 tokens   4-7 with 0-3 and 12-15 with 8-11, split at the middles of the part's halves
//   near       the tokens of a span of four with each other, summed in fp32 by the factor warps
//
// k split at the middle takes the place of k, k split at the halves' middles has SteepK, and q,
// which stands on the left side only, the place of q: tokens 8-15 split at the middle in their own
// rows, 4-7 split at their half's in theirs, and 12-15 split so in the rows of 0-3.
#pragma once

#include "../../common/params.h"
#include "config.h"

namespace flashkda::cuda::sm90::prefill {

// Where k split at the halves' middles lies: in rows of 128 bytes from `offset` of Raw::g on, the
// quarter's first piece being `piece`. Gates of 16 bits leave the second half of g free, which
// takes tiles like k's; fp32 ones leave each quarter only its own room.
struct SteepK {
  int offset, piece;
};

__device__ __forceinline__ SteepK steep_k(DType gate, int quarter) {
  return gate == DType::kF32 ? SteepK{quarter * kTileBytes, 0}
                             : SteepK{(2 + quarter / 2) * kTileBytes, quarter % 2 * 4};
}

// Sums over a quarter's channels for each span: k k of tokens (1, 0), (2, 0), (2, 1), (3, 0), (3,
// 1) and (3, 2), then q k.
inline constexpr int kNearPairs = 6;

__host__ __device__ constexpr int near_pair(int i, int j) { return i * (i - 1) / 2 + j; }

using Near = float[4][2 * kNearPairs];

}  // namespace flashkda::cuda::sm90::prefill
