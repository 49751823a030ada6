// Sizes of the recurrent kernels; docs/decode.md says what they follow from.
#pragma once

#include "../../common/params.h"

namespace flashkda::cuda::sm80::decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Any tokens.
constexpr int kSliceV = 32;      // columns of V of a block: 16 KB of fp32 registers at K = 128
constexpr int kBlockTokens = 4;  // tokens fetched at once, while those before are worked on
constexpr int kBlocksPerSM = 5;  // which is what bounds a block's registers

// One token a sequence: pieces of 128 bytes of a row of [K, V], 16 KB of state at K = 128.
constexpr int one_token_columns(DType state) { return state == DType::kF32 ? 32 : 64; }
constexpr int one_token_blocks(DType state, bool v_first) {
  return (v_first ? 8 : 10) - (state == DType::kF32 ? 0 : 1);
}

}  // namespace flashkda::cuda::sm80::decode
