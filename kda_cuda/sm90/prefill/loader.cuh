// Brings chunks into the rings with the copy engine.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "../ptx.cuh"
#include "maps.h"
#include "shared.cuh"
#include "work.cuh"

namespace flashkda::cuda::sm90::prefill {

// Rows past the tensor's end arrive as zeros; rows past the sequence's end are the next sequence's.
template <class Cfg>
class Loader {
 public:
  __device__ Loader(const Problem& p, const Maps& maps, const Work& w, const Shared<Cfg>& s,
                    uint32_t base)
      : maps_(maps), w_(w), s_(s), base_(base), wide_gate_(p.g.dtype == DType::kF32) {}

  // By the warp that loads every kSquareWarps-th chunk.
  __device__ __forceinline__ void load(int chunk) const {
    if (cute::elect_one_sync()) {
      const int raw = chunk % kRaw, values = chunk % kValues;
      ptx::mbarrier_wait_at(at(&s_.raw_empty[raw]), chunk / kRaw & 1 ^ 1);
      load_raw(s_.raw[raw], at(&s_.raw_full[raw]), chunk);
      ptx::mbarrier_wait_at(at(&s_.values_empty[values]), chunk / kValues & 1 ^ 1);
      load_values(s_.values[values], at(&s_.values_full[values]), chunk);
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

  __device__ __forceinline__ void load_raw(const Raw& to, uint32_t full, int chunk) const {
    ptx::mbarrier_expect(full, (wide_gate_ ? 8 : 6) * kHalfBytes);
    copy(maps_.g, at(to.g), full, 0, w_.hv, chunk);
    if (!wide_gate_) copy(maps_.g, at(to.g) + kHalfBytes, full, kHalf, w_.hv, chunk);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy(maps_.k, at(to.k[half]), full, half * kHalf, w_.h, chunk);
      copy(maps_.q, at(to.q[half]), full, half * kHalf, w_.h, chunk);
    }
  }

  __device__ __forceinline__ void load_values(const Values<Cfg>& to, uint32_t full,
                                              int chunk) const {
    ptx::mbarrier_expect(full, sizeof(to.v));
#pragma unroll
    for (int group = 0; group < Cfg::kChainGroups; ++group) {
      copy(maps_.v, at(to.v[group]), full, w_.v0 + group * kHalf, w_.hv, chunk);
    }
  }

  const Maps& maps_;
  const Work& w_;
  const Shared<Cfg>& s_;
  uint32_t base_;
  bool wide_gate_;
};

}  // namespace flashkda::cuda::sm90::prefill
