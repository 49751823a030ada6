// Brings chunks into the rings with the copy engine: one thread issues all copies.
#pragma once

#include "../ptx.cuh"
#include "shared.cuh"
#include "maps.h"
#include "work.cuh"

namespace flashkda::cuda::sm90::prefill {

// Rows past the tensor's end arrive as zeros; rows past the sequence's end are the next sequence's.
template <class Cfg>
__device__ __forceinline__ void load_chunks(const Problem& p, const Maps& maps, const Work& w,
                                            Shared<Cfg>& s) {
  const auto copy = [&](const CUtensorMap& map, uint64_t* barrier, void* to, int column, int head,
                        int token) {
    cute::SM90_TMA_LOAD_4D::copy(&map, barrier,
                                 static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST), to,
                                 column, head, token, static_cast<int>(w.row));
  };
  const uint32_t g_bytes = kChunk * kChannels * (p.g.dtype == DType::kF32 ? 4 : 2);
  Cursor<kRaw> raw(0);
  Cursor<kValues> values(0);
  for (int c = 0; c < w.chunks; ++c) {
    const int token = static_cast<int>(w.begin) + c * kChunk;
    Raw& to = s.raw[raw.at];
    uint64_t* barrier = &s.raw_full[raw.at];
    ptx::mbarrier_wait_suspended(&s.raw_empty[raw.at], raw.parity ^ 1);
    ptx::mbarrier_expect(barrier, sizeof(to.k) + sizeof(to.q) + g_bytes);
    copy(maps.g, barrier, to.g, 0, w.hv, token);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      copy(maps.k, barrier, to.k[half], half * kHalf, w.h, token);
      copy(maps.q, barrier, to.q[half], half * kHalf, w.h, token);
    }
    ptx::mbarrier_wait_suspended(&s.values_empty[values.at], values.parity ^ 1);
    barrier = &s.values_full[values.at];
    ptx::mbarrier_expect(barrier, sizeof(Values<Cfg>::v));
#pragma unroll
    for (int group = 0; group < Cfg::kChainGroups; ++group) {
      copy(maps.v, barrier, s.values[values.at].v[group], w.v0 + group * kHalf, w.hv, token);
    }
    raw.advance(1);
    values.advance(1);
  }
}

}  // namespace flashkda::cuda::sm90::prefill
