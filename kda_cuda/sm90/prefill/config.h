// Sizes of the Hopper prefill kernel.
#pragma once

namespace flashkda::cuda::sm90::prefill {

inline constexpr int kChunk = 16;
inline constexpr int kChannels = 128;   // K
inline constexpr int kGroupThreads = 128;
inline constexpr int kSquareWarps = 4;

// VS: the value columns that one block carries the state of, 64 of them a chain warpgroup.
template <int VS_>
struct Config {
  static constexpr int VS = VS_;
  static constexpr int kChainGroups = VS / 64;
  static constexpr int kFactorGroups = 3 - kChainGroups;  // each makes a chunk
  static constexpr int kThreads = 4 * kGroupThreads;
  static constexpr int kChainRegisters = 152;
  static constexpr int kSquareRegisters = 96;
  static constexpr int kFactorRegisters = kChainGroups == 2 ? 112 : 128;
  static_assert(kChainGroups * kChainRegisters + kSquareRegisters +
                        kFactorGroups * kFactorRegisters <=
                    512,
                "a multiprocessor has 512 registers for each of 128 threads");
};

inline constexpr int kSlots = 6;  // of factors and of v
inline constexpr int kRaw = 4;    // of q, k and g
inline constexpr int kAhead = 2;  // how many chunks before its square warp's turn a chunk is loaded

// A wait on a parity is only sound if the barrier is not a whole phase further behind: who waits for
// a slot's use has to know of the use before it. A square warp therefore loads the same raw slots
// again and again, and factor groups, taking turns, meet the same slots too. Of v's slots a square
// warp knows because it has finished a chunk whose factors could only be made when the chain had
// read the slot's use before.
static_assert(kRaw % kSquareWarps == 0 && kSquareWarps < kSlots);
static_assert(kRaw % 2 == 0 && kSlots % 2 == 0, "there are one or two factor groups");

// A tile is stored in halves of 64 channels, whose rows of 128 bytes are swizzled as the copy engine
// and the tensor cores swizzle them (tile.cuh).
inline constexpr int kHalf = 64;

}  // namespace flashkda::cuda::sm90::prefill
