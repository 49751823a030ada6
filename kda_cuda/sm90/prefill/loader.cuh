// Brings parts of chunks into the rings with the copy engine.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "../ptx.cuh"
#include "maps.h"
#include "shared.cuh"

namespace flashkda::cuda::sm90::prefill {

// Rows past the tensor's end arrive as zeros; rows past the sequence's end are the next sequence's.
template <class Cfg>
class Loader {
 public:
  __device__ Loader(const Problem& p, const Maps& maps, const Shared<Cfg>& s)
      : maps_(maps),
        s_(s),
        gate_bytes_(p.g.dtype == DType::kF32 ? sizeof(Raw::g) : sizeof(Raw::g) / 2) {}

  // Half of what a chunk's q, k and g are, g or the others, from token `first` of the sequence on.
  // head: of the cluster's. use: the chunk's. before: that of the chunk whose place it takes.
  __device__ __forceinline__ void load_raw(int first, int head, int half, Raw& to,
                                           const Cursor& use, const Cursor& before) const {
    if (cute::elect_one_sync()) {
      const Origin x = s_.origins[head];
      const uint32_t full = at(&s_.raw_full[use.at]);
      ptx::mbarrier_wait_at(at(&s_.raw_empty[before.at]), before.parity);
      if (half == 0) {
        ptx::mbarrier_expect(full, gate_bytes_);
        ptx::copy_box(&maps_.g, at(to.g), full, 0, x.begin + first, 0, x.hv, x.row);
      } else {
        ptx::mbarrier_expect(full, sizeof(to.k) + sizeof(to.q));
        ptx::copy_box(&maps_.k, at(to.k), full, 0, x.begin + first, 0, x.h, x.row);
        ptx::copy_box(&maps_.q, at(to.q), full, 0, x.begin + first, 0, x.h, x.row);
      }
    }
    __syncwarp();
  }

  // The block's columns of v of a chunk, if the sequence has it. Not before the chunk's turn:
  // earlier, this would wait for the chain to have read the slot.
  __device__ __forceinline__ void load_values(int ring, int slot, uint32_t parity,
                                              int tokens) const {
    const int token = (ring + slot) * kChunk;
    if (token < tokens && cute::elect_one_sync()) {
      const Origin x = s_.origins[0];
      const uint32_t full = at(&s_.full[slot]);
      ptx::mbarrier_wait_at(at(&s_.values_empty[slot]), parity ^ 1);
      ptx::mbarrier_expect(full, sizeof(s_.values[slot]));
      ptx::copy_box(&maps_.v, at(&s_.values[slot]), full, 0, x.begin + token, x.half, x.hv, x.row);
    }
    __syncwarp();
  }

  // The same of all chunks, for a block that makes none.
  __device__ __forceinline__ void load_all_values(int tokens) const {
    Cursor slot(Cfg::kSlots);
    int ring = 0;
#pragma unroll 1
    while ((ring + slot.at) * kChunk < tokens) {
      load_values(ring, slot.at, slot.parity, tokens);
      slot.advance(1);
      ring += slot.at == 0 ? Cfg::kSlots : 0;
    }
  }

  // All chunks, from where others of a team that is apart put them.
  __device__ __forceinline__ void take_chunks(int rank, int chunks, int lane) const {
    const Stock stock = s_.stock;
    unsigned* const taken = rank == 0 ? &stock.flags->taken.x : &stock.flags->taken.y;
    Cursor slot(Cfg::kSlots);
    int put = 0;
#pragma unroll 1
    for (int c = 0; c < chunks; ++c) {
      // A look shows all places: how many of the chunks from `put` on, up to a round's, are there.
      while (put == c) {
        const int next = put + lane % kStock;
        const unsigned parts = ptx::load_acquire(&stock.flags->put[next % kStock]);
        const unsigned there = __ballot_sync(~0u, parts == 2 * (next / kStock + 1));
        put += min(__ffs(~there) - 1, kStock);
      }
      __syncwarp();
      if (cute::elect_one_sync()) {
        const uint32_t full = at(&s_.full[slot.at]);
        ptx::mbarrier_wait_at(at(&s_.empty[slot.at]), slot.parity ^ 1);
        // What is given back has been read: the flag need not be ordered behind it.
        if (c >= Cfg::kSlots) ptx::store_relaxed(taken, c - Cfg::kSlots + 1);
        ptx::fence_async_proxy_global();
        ptx::mbarrier_expect(full, kSlotBytes);
        ptx::copy_from_global(at(&s_.slots[slot.at]), &stock.chunks[c % kStock], kSlotBytes, full);
      }
      __syncwarp();
      slot.advance(1);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t at(const void* part) {
    return ptx::smem_address(part);
  }

  const Maps& maps_;
  const Shared<Cfg>& s_;
  uint32_t gate_bytes_;
};

}  // namespace flashkda::cuda::sm90::prefill
