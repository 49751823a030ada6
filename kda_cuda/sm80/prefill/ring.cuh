// Places in the ring of chunks in shared memory.
#pragma once

#include <cstdint>

#include "../../common/ptx.cuh"
#include "../../common/work.cuh"
#include "config.h"

namespace flashkda::cuda::sm80::prefill {

// A slot of the ring and the parity of its current use; chunk c uses slot c % slots.
//
// A wait on a parity is only sound if the barrier is not a whole phase further behind. For the
// loader and the chain, which take all chunks in turn, it never is. Producers and helpers skip
// chunks, but wait for a chunk's loads (raw) before anything else of it. The loader's copies land
// in order and it has made one that came after chunk c - slots, so that raw is not behind; and
// since the loader began chunk c once the chain had read chunk c - slots, no other barrier is.
//
// An arrival may overtake an earlier load of the same warp whose data are still on their way. So a
// warp only says that it has read something once an instruction has used what was read: products,
// stores and votes come before the arrival in program order and wait for their operands.
struct RingPosition {
  int slot;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit RingPosition(int chunk) : slot(chunk) {}

  // chunks is at most the ring's slots.
  __device__ __forceinline__ void advance(int chunks, int slots) {
    slot += chunks;
    if (slot >= slots) {
      slot -= slots;
      parity ^= 1;
    }
  }
};

template <class Cfg>
__device__ __forceinline__ Slot<Cfg>* slot_at(char* smem, int slot) {
  return reinterpret_cast<Slot<Cfg>*>(smem + kSlotsOffset) + slot;
}

__device__ __forceinline__ Barriers* barriers_at(char* smem) {
  return reinterpret_cast<Barriers*>(smem);
}

}  // namespace flashkda::cuda::sm80::prefill
