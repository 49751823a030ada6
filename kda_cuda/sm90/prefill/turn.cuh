// Which chunks a block makes, in which order, and where they lie. The chunks of a chain go round
// the kSlots slots of its block's ring: a slot has one maker for good.
//
//   Whole   the block makes all
//   Halves  slot s: block s % 2, for both
//   Fed     slot s: block 2 + s % 2, for both others; Apart likewise, and Ample with chunks c and
//           blocks 2 + c % 4: what is handed over through global memory may go to any slot
//   Helped  slots 0 and 2: blocks 0 and 1, for both; the others: block 2, for both
//   Threes  slot 1 + i of block i: block 3; the others: block i. The fourth block's work is thus
//           spread over time.
#pragma once

#include "config.h"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
__device__ __forceinline__ bool has_chain(int rank) {
  return Cfg::kMakerBlocks == 0 || rank < Cfg::kChainBlocks;
}

template <class Cfg>
__device__ __forceinline__ bool makes_chunks(int rank) {
  return !Cfg::kMakersOnly || !has_chain<Cfg>(rank);
}

// Whether others read what a block makes.
template <class Cfg>
__device__ __forceinline__ bool sends_chunks(int rank) {
  return Cfg::kTeam > 1 && (Cfg::kHeads == 1 || !has_chain<Cfg>(rank));
}

// Whether two of its square warps make none, so that it holds the raw inputs of one chunk.
template <class Cfg>
__device__ __forceinline__ bool makes_few(int rank) {
  return Cfg::kHelped && has_chain<Cfg>(rank);
}

// How many chunks' raw inputs a block holds, and for how many it uses barriers.
template <class Cfg>
__device__ __forceinline__ int held(int rank) {
  return makes_few<Cfg>(rank) ? 1 : Cfg::kHeld;
}
template <class Cfg>
__device__ __forceinline__ int uses(int rank) {
  return makes_few<Cfg>(rank) ? 1 : Cfg::kUses;
}

// Warpgroups that take its parts by turns.
template <class Cfg>
__device__ __forceinline__ int factor_groups(int rank) {
  static_assert(!Cfg::kEager || Cfg::kFactorGroups == 2 && Cfg::kOwn == 3);
  return Cfg::kEager && !has_chain<Cfg>(rank) ? 3 : Cfg::kFactorGroups;
}

// Slots whose chunks a block makes.
template <class Cfg>
__device__ __forceinline__ int own_slots(int rank) {
  return makes_few<Cfg>(rank) ? 1 : Cfg::kOwn;
}

// Of a block's own slots, the `stage`-th one's number in the ring.
template <class Cfg>
__device__ __forceinline__ int slot_of(int stage, int rank) {
  if constexpr (Cfg::kMakersOnly) {
    return stage * Cfg::kMakerBlocks + rank - Cfg::kChainBlocks;
  } else if constexpr (Cfg::kHelped) {
    return has_chain<Cfg>(rank) ? 2 * rank : stage == 0 ? 1 : 2 + stage;
  } else if constexpr (Cfg::kHeads > 1) {
    return stage + (!has_chain<Cfg>(rank) || stage > rank);
  } else {
    return stage * Cfg::kChainBlocks + rank;
  }
}

// Where in its maker's shared memory a chunk is made.
template <class Cfg>
__device__ __forceinline__ int place_of(int stage, int rank) {
  if (has_chain<Cfg>(rank)) return slot_of<Cfg>(stage, rank);
  return Cfg::kHelped ? Cfg::kSlots - Cfg::kOwn + stage : stage;
}

struct Maker {
  int rank, stage;
};

// Who makes the chunks of a slot of this chain block. What is handed over through global memory
// goes to the next slot, whoever made it: then only that it is another block is of use.
template <class Cfg>
__device__ __forceinline__ Maker maker_of(int slot, int rank) {
  if constexpr (Cfg::kMakersOnly) {
    return {Cfg::kChainBlocks + slot % Cfg::kMakerBlocks, slot / Cfg::kMakerBlocks};
  } else if constexpr (Cfg::kHelped) {
    return slot == 0 || slot == 2 ? Maker{slot / 2, 0}
                                  : Maker{Cfg::kChainBlocks, slot == 1 ? 0 : slot - 2};
  } else if constexpr (Cfg::kHeads > 1) {
    return slot == 1 + rank ? Maker{Cfg::kChainBlocks, rank} : Maker{rank, slot - (slot > rank)};
  } else {
    return {slot % Cfg::kChainBlocks, slot / Cfg::kChainBlocks};
  }
}

// A chunk of those that a block makes, one after another.
template <class Cfg>
struct Turn {
  int rank;  // of the block in its team
  int stage;
  uint32_t parity = 0;  // of the slot's use
  int ring = 0;         // the chunk that lies in the ring's first slot

  __device__ __forceinline__ Turn(int rank, int first) : rank(rank), stage(first) {}

  __device__ __forceinline__ void advance(int by) {
    stage += by;
    if (stage >= own_slots<Cfg>(rank)) {
      stage -= own_slots<Cfg>(rank);
      parity ^= 1;
      ring += Cfg::kRound;
    }
  }

  __device__ __forceinline__ int slot() const { return slot_of<Cfg>(stage, rank); }
  __device__ __forceinline__ int place() const { return place_of<Cfg>(stage, rank); }
  __device__ __forceinline__ int chunk() const { return ring + slot(); }
  // Of the team's heads.
  __device__ __forceinline__ int head() const {
    return Cfg::kHeads > 1 && !has_chain<Cfg>(rank) ? stage : 0;
  }

  // The slots of v that are filled at this turn: of the chunks that others make meanwhile too.
  __device__ __forceinline__ int first_values() const {
    return Cfg::kHeads == 1 ? stage * Cfg::kChainBlocks : slot();
  }
  __device__ __forceinline__ int values() const {
    return Cfg::kHeads == 1 ? Cfg::kChainBlocks : slot() == rank ? 2 : 1;
  }
};

}  // namespace flashkda::cuda::sm90::prefill
