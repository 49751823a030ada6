// Sizes of the Hopper prefill kernel.
#pragma once

namespace flashkda::cuda::sm90::prefill {

inline constexpr int kPart = 16;          // tokens before, and after, the middle of a chunk
inline constexpr int kChunk = 2 * kPart;  // tokens of a chain's step
inline constexpr int kChannels = 128;     // K
inline constexpr int kGroupThreads = 128;
inline constexpr int kSquareWarps = 4;

// VS: the value columns that one block carries the state of, 64 of them a chain warpgroup.
// kChainBlocks_ of these are a team, with kMakerBlocks_ that carry none and make chunks for them
// (turn.cuh says which). A team is a cluster, whose blocks write to each other's shared memory; or
// its blocks are apart, on any SMs, and hand chunks over through global memory (Stock in
// shared.cuh).
template <int VS_, int kChainBlocks_, int kMakerBlocks_, bool kApart_ = false>
struct Config {
  static constexpr int VS = VS_;
  static constexpr int kChainBlocks = kChainBlocks_;
  static constexpr int kMakerBlocks = kMakerBlocks_;
  static constexpr bool kApart = kApart_;
  static constexpr int kTeam = kChainBlocks + kMakerBlocks;
  static constexpr int kCluster = kApart ? 1 : kTeam;
  static constexpr int kHeads = kChainBlocks * VS / kChannels;  // of a team
  static constexpr int kChainGroups = VS / 64;
  static constexpr int kFactorGroups = 3 - kChainGroups;             // two take a part each
  static constexpr bool kMakersOnly = kMakerBlocks > 1;              // chain blocks make none
  static constexpr bool kHelped = kMakerBlocks == 1 && kHeads == 1;  // chain blocks make few
  static constexpr int kThreads = 4 * kGroupThreads;
  static constexpr int kChainRegisters = kMakersOnly ? 240 : kChainGroups == 2 ? 160 : 184;
  static constexpr int kIdleRegisters = 88;  // beside a lone chain, of all others
  static constexpr int kSquareRegisters = 96;
  static constexpr int kFactorRegisters = kFactorGroups == 1 ? 96 : 112;
  static_assert(kMakersOnly ? kChainRegisters + 3 * kIdleRegisters <= 512
                            : kChainGroups * kChainRegisters + kSquareRegisters +
                                      kFactorGroups * kFactorRegisters <=
                                  512,
                "a multiprocessor has 512 registers for each of 128 threads");

  static constexpr int kSlots = kMakersOnly ? 6 : kHelped ? 5 : 4;  // of finished chunks and of v
  // Slots whose chunks a block makes, at most; if makers alone make any, of its own, wherever the
  // chunks go.
  static constexpr int kOwn = kMakersOnly         ? 3
                              : kHelped           ? kSlots - kChainBlocks
                              : kMakerBlocks == 1 ? kSlots - 1
                                                  : kSlots / kChainBlocks;
  // Chunks until a block comes to its first slot again.
  static constexpr int kRound = kMakersOnly ? kOwn * kMakerBlocks : kSlots;
  static_assert(kApart || kRound == kSlots);
  // A block without a chain has its warpgroup make factors, and what three chunks are made of.
  static constexpr bool kEager = kMakerBlocks > 0 && kHeads == 1;
  static constexpr int kHeld = kEager ? 3 : 2;  // chunks whose raw inputs a block holds at most
  static constexpr int kUses = kEager ? 6 : 2;  // and for which it has barriers
  // Blocks that read a chunk.
  static constexpr int kReaders = kHeads == 1 ? kChainBlocks : 1;
  // Slots that are given back to a warp of this block: its own, or, apart, all of a reader's.
  static constexpr int kEmptied = kApart ? kSlots : kOwn;
};

using Whole = Config<128, 1, 0>;  // a head a block
using Halves = Config<64, 2, 0>;  // a head on two blocks, each of which makes every other chunk
using Fed = Config<64, 2, 2>;     // the same with two blocks that make all chunks
using Apart = Config<64, 2, 2, true>;  // as Fed, the four on any SMs
using Ample = Config<64, 2, 4, true>;  // as Apart with four that make chunks
using Helped = Config<64, 2, 1>;   // two blocks of a head, with one that makes three chunks in five
using Threes = Config<128, 3, 1>;  // three heads, for each of which the fourth block makes one
                                   // chunk in four

// A wait on a parity is only sound if the barrier is not a whole phase further behind: who waits
// for a barrier's phase has to have waited for the one before. The barriers of raw inputs and
// factors therefore go by kUses chunks of a block's, a multiple of those after which the same
// square warp and the same factor warpgroup come to a part again, and so do a block's own slots.

// A tile is stored in halves of 64 channels, whose rows of 128 bytes are swizzled as the copy
// engine and the tensor cores swizzle them (tile.cuh).
inline constexpr int kHalf = 64;
inline constexpr int kRowBytes = 128;
inline constexpr int kTileBytes = kChunk * kRowBytes;  // a chunk's rows
inline constexpr int kLateRows = kPart * kRowBytes;    // where the late part's begin

}  // namespace flashkda::cuda::sm90::prefill
