// Sizes of the recurrent kernel; docs/decode.md says what they follow from.
#pragma once

namespace flashkda::cuda::sm80::decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSliceV = 32;      // columns of V of a block: 16 KB of fp32 state at K = 128
constexpr int kBlockTokens = 4;  // tokens fetched at once, while those before are worked on
// Blocks that a SM has room for, which is what bounds their registers.
constexpr int kBlocksPerSM = 5;
constexpr int kBlocksPerSMOne = 7;  // with one token a sequence

}  // namespace flashkda::cuda::sm80::decode
