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
  __device__ Loader(const Problem& p, const Maps& maps, const Work& w, const Shared<Cfg>& s)
      : maps_(maps),
        w_(w),
        s_(s),
        gate_bytes_(p.g.dtype == DType::kF32 ? sizeof(Raw::g) : sizeof(Raw::g) / 2) {}

  // q, k and g from token `first` of the sequence on, the block's own turn-th part, by the warp
  // that loads every kSquareWarps-th.
  __device__ __forceinline__ void load_raw(int first, int turn) const {
    if (cute::elect_one_sync()) {
      const int slot = turn % kRaw;
      const Raw& to = s_.raw[slot];
      const uint32_t full = at(&s_.raw_full[slot]);
      ptx::mbarrier_wait_at(at(&s_.raw_empty[slot]), turn / kRaw & 1 ^ 1);
      ptx::mbarrier_expect(full, sizeof(to.k) + sizeof(to.q) + gate_bytes_);
      copy(maps_.g, at(to.g), full, 0, w_.hv, first);
      copy(maps_.k, at(to.k), full, 0, w_.h, first);
      copy(maps_.q, at(to.q), full, 0, w_.h, first);
    }
    __syncwarp();
  }

  // The block's columns of v of this part of the chunks that the cluster makes at a turn, its own
  // and the others', when the turn begins: earlier, this would wait for the chain to have read the
  // slots. chunk: the first of them.
  __device__ __forceinline__ void load_values(int chunk, int part,
                                              const Cursor<Cfg::kOwn>& own) const {
    if (cute::elect_one_sync()) {
#pragma unroll
      for (int i = 0; i < Cfg::kCluster; ++i) {
        const int slot = own.at * Cfg::kCluster + i;
        if (chunk + i >= w_.chunks) break;
        const uint32_t full = at(&s_.values_full[slot]);
        ptx::mbarrier_wait_at(at(&s_.values_empty[slot]), own.parity ^ 1);
        ptx::mbarrier_expect(full, sizeof(s_.values[slot][part]));
        copy(maps_.v, at(&s_.values[slot][part]), full, w_.v0 / kHalf, w_.hv,
             (chunk + i) * kChunk + part * kPart);
      }
    }
    __syncwarp();
  }

 private:
  static __device__ __forceinline__ uint32_t at(const void* part) {
    return ptx::smem_address(part);
  }

  __device__ __forceinline__ void copy(const CUtensorMap& map, uint32_t to, uint32_t barrier,
                                       int column, int head, int first) const {
    ptx::copy_box(&map, to, barrier, 0, static_cast<int>(w_.begin) + first, column, head,
                  static_cast<int>(w_.row));
  }

  const Maps& maps_;
  const Work& w_;
  const Shared<Cfg>& s_;
  uint32_t gate_bytes_;
};

}  // namespace flashkda::cuda::sm90::prefill
