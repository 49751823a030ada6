// Sizes of the recurrent kernels; docs/decode.md says what they follow from.
#pragma once

#include "../../common/params.h"

namespace flashkda::cuda::sm80::decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

// Columns of V of a block that holds them in registers: 16 KB of fp32 at K = 128.
constexpr int kSliceV = 32;

// Any tokens.
constexpr int kBlockTokens = 4;  // tokens fetched at once, while those before are worked on
constexpr int kBlocksPerSM = 5;  // which is what bounds a block's registers

// One token a sequence.
constexpr int kOneTokenColumns = 64;  // pieces of at least 128 bytes of a row of [K, V]
constexpr int kOneTokenBlocks = 5;    // a SM

// One token of few sequences: of no more slices of kSliceV columns than fit the GPU at once.
constexpr int kFewBlocks = 8;  // a SM

}  // namespace flashkda::cuda::sm80::decode
