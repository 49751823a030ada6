// Sizes of the Hopper prefill kernel.
#pragma once

namespace flashkda::cuda::sm90::prefill {

inline constexpr int kPart = 16;          // tokens before, and after, the middle of a chunk
inline constexpr int kChunk = 2 * kPart;  // tokens of a chain's step
inline constexpr int kChannels = 128;     // K
inline constexpr int kGroupThreads = 128;
inline constexpr int kSquareWarps = 4;

// VS: the value columns that one block carries the state of, 64 of them a chain warpgroup. Where
// that is a slice of V, the blocks of all slices are a cluster and each makes every kCluster-th
// chunk for all.
template <int VS_>
struct Config {
  static constexpr int VS = VS_;
  static constexpr int kCluster = kChannels / VS;
  static constexpr int kChainGroups = VS / 64;
  static constexpr int kFactorGroups = 3 - kChainGroups;  // each makes a chunk
  static constexpr int kThreads = 4 * kGroupThreads;
  static constexpr int kChainRegisters = kChainGroups == 2 ? 160 : 184;
  static constexpr int kSquareRegisters = 96;
  static constexpr int kFactorRegisters = kFactorGroups == 1 ? 96 : 112;
  static_assert(kChainGroups * kChainRegisters + kSquareRegisters +
                        kFactorGroups * kFactorRegisters <=
                    512,
                "a multiprocessor has 512 registers for each of 128 threads");

  static constexpr int kSlots = 4;                // of finished chunks and of v
  static constexpr int kOwn = kSlots / kCluster;  // slots whose chunks this block makes
  static_assert(kSlots % kCluster == 0 && kOwn % kFactorGroups == 0);
};

inline constexpr int kRaw = 4;    // of a part's q, k and g
inline constexpr int kAhead = 2;  // how many of a block's parts before its turn a part is loaded

// A wait on a parity is only sound if the barrier is not a whole phase further behind: who waits
// for a slot's use has to know of the use before it. A square warp therefore loads the same raw
// slots again and again, and factor groups, taking turns, meet the same slots too.
static_assert(kRaw % kSquareWarps == 0 && kRaw % 2 == 0);

// A tile is stored in halves of 64 channels, whose rows of 128 bytes are swizzled as the copy
// engine and the tensor cores swizzle them (tile.cuh).
inline constexpr int kHalf = 64;
inline constexpr int kRowBytes = 128;

}  // namespace flashkda::cuda::sm90::prefill
