// Brings chunks into the rings with the copy engine.
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
  __device__ Loader(const Problem& p, const Maps& maps, const Work& w, const Shared<Cfg>& s,
                    uint32_t base)
      : maps_(maps), w_(w), s_(s), base_(base), wide_gate_(p.g.dtype == DType::kF32) {}

  // q, k and g of a chunk that is the block's own turn-th, by the warp that loads every
  // kSquareWarps-th.
  __device__ __forceinline__ void load_raw(int chunk, int turn) const {
    if (cute::elect_one_sync()) {
      const int slot = turn % kRaw;
      const Raw& to = s_.raw[slot];
      const uint32_t full = at(&s_.raw_full[slot]);
      ptx::mbarrier_wait_at(at(&s_.raw_empty[slot]), turn / kRaw & 1 ^ 1);
      ptx::mbarrier_expect(full, (wide_gate_ ? 8 : 6) * kHalfBytes);
      copy(maps_.g, at(to.g), full, 0, w_.hv, chunk);
      if (!wide_gate_) copy(maps_.g, at(to.g) + kHalfBytes, full, kHalf, w_.hv, chunk);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        copy(maps_.k, at(to.k[half]), full, half * kHalf, w_.h, chunk);
        copy(maps_.q, at(to.q[half]), full, half * kHalf, w_.h, chunk);
      }
    }
    __syncwarp();
  }

  // The block's columns of v of the chunks that the cluster makes at a turn, its own and the
  // others', when the turn begins: earlier, this would wait for the chain to have read the slots.
  __device__ __forceinline__ void load_values(int turn, const Cursor<Cfg::kOwn>& own) const {
    if (cute::elect_one_sync()) {
#pragma unroll
      for (int i = 0; i < Cfg::kCluster; ++i) {
        const int chunk = turn * Cfg::kCluster + i, slot = own.at * Cfg::kCluster + i;
        if (chunk >= w_.chunks) break;
        const uint32_t full = at(&s_.values_full[slot]);
        ptx::mbarrier_wait_at(at(&s_.values_empty[slot]), own.parity ^ 1);
        ptx::mbarrier_expect(full, sizeof(s_.values[slot]));
#pragma unroll
        for (int group = 0; group < Cfg::kChainGroups; ++group) {
          copy(maps_.v, at(&s_.values[slot][group]), full, w_.v0 + group * kHalf, w_.hv, chunk);
        }
      }
    }
    __syncwarp();
  }

 private:
  static constexpr uint32_t kHalfBytes = sizeof(Raw::k[0]);

  __device__ __forceinline__ uint32_t at(const void* part) const {
    return address_of(s_, base_, part);
  }

  __device__ __forceinline__ void copy(const CUtensorMap& map, uint32_t to, uint32_t barrier,
                                       int column, int head, int chunk) const {
    ptx::copy_box(&map, to, barrier, column, head, static_cast<int>(w_.begin) + chunk * kChunk,
                  static_cast<int>(w_.row));
  }

  const Maps& maps_;
  const Work& w_;
  const Shared<Cfg>& s_;
  uint32_t base_;
  bool wide_gate_;
};

}  // namespace flashkda::cuda::sm90::prefill
