// Sizes of the recurrent kernel; docs/decode.md says what they follow from.
#pragma once

namespace flashkda::cuda::sm80::decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kSliceV = 32;      // value columns of a block: 16 KB of fp32 state at K = 128
constexpr int kBlockTokens = 4;  // tokens fetched at once, while the block works on those before
constexpr int kMinBlocks = 5;    // blocks a SM must hold: bounds the registers to 96

}  // namespace flashkda::cuda::sm80::decode
