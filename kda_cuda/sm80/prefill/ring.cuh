// Places in the ring of chunks in shared memory.
#pragma once

#include <cstdint>

#include "../../common/work.cuh"
#include "config.h"

namespace flashkda::cuda::sm80::prefill {

// A slot of the ring and the parity of its current use; chunk c uses slot c % slots.
//
// A wait on a parity is only sound if the barrier is not a whole phase further behind. For the
// chain and the helpers, which take all chunks in turn, it never is. A producer of chunk c waits
// for the chain to have read chunk c - slots (empty) before it waits for c's own loads (raw), so
// that raw is not behind; and it has made chunk c - producers, whose loads began after the chain
// had read c - producers - slots, so that neither empty is, for c as for the later chunk c + ahead
// whose loads it begins.
struct RingPosition {
  int slot;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit RingPosition(int chunk) : slot(chunk) {}

  // chunks is at most the ring's slots.
  __device__ __forceinline__ void advance(int chunks, const Ring& ring) {
    slot += chunks;
    if (slot >= ring.slots) {
      slot -= ring.slots;
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
