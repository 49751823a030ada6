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

  // q, k and g of a part, from token `first` of the sequence on, for the use of the slot that has
  // this parity.
  __device__ __forceinline__ void load_raw(int first, int slot, uint32_t parity) const {
    if (cute::elect_one_sync()) {
      const Origin x = s_.origin;
      const Raw& to = s_.raw[slot];
      const uint32_t full = at(&s_.raw_full[slot]);
      ptx::mbarrier_wait_at(at(&s_.raw_empty[slot]), parity ^ 1);
      ptx::mbarrier_expect(full, sizeof(to.k) + sizeof(to.q) + gate_bytes_);
      ptx::copy_box(&maps_.g, at(to.g), full, 0, x.begin + first, 0, x.hv, x.row);
      ptx::copy_box(&maps_.k, at(to.k), full, 0, x.begin + first, 0, x.h, x.row);
      ptx::copy_box(&maps_.q, at(to.q), full, 0, x.begin + first, 0, x.h, x.row);
    }
    __syncwarp();
  }

  // The block's columns of v of this part of the chunks that the cluster makes at a turn, its own
  // and the others', when the turn begins: earlier, this would wait for the chain to have read the
  // slots. first: the first token of them; tokens: of the sequence.
  __device__ __forceinline__ void load_values(int first, int tokens, int part,
                                              const Cursor<Cfg::kOwn>& own) const {
    if (cute::elect_one_sync()) {
      const Origin x = s_.origin;
#pragma unroll
      for (int i = 0; i < Cfg::kCluster; ++i) {
        const int slot = own.at * Cfg::kCluster + i;
        if (first + i * kChunk >= tokens) break;
        const uint32_t full = at(&s_.values_full[slot]);
        ptx::mbarrier_wait_at(at(&s_.values_empty[slot]), own.parity ^ 1);
        ptx::mbarrier_expect(full, sizeof(s_.values[slot][part]));
        ptx::copy_box(&maps_.v, at(&s_.values[slot][part]), full, 0,
                      x.begin + first + i * kChunk + part * kPart, x.half, x.hv, x.row);
      }
    }
    __syncwarp();
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
