// The kernels' launchers; those of a gate are compiled in a file of their own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../../common/params.h"
#include "config.h"
#include "shared.cuh"

namespace flashkda::cuda::sm90::prefill {

// What a launch does of a call. Heads are counted through all sequences.
struct Share {
  int64_t first_head = 0, heads = 0;
  bool beside = false;  // it may run while the grid before it does
  Stock stock = {};
};

template <class Cfg, Gate kGate>
cudaError_t launch_instance(const Problem& p, const Target& target, cudaStream_t stream,
                            const Share& share);

// How many clusters the GPU holds at once, which depends on how its SMs are grouped, but not on the
// gate; 0: none.
template <class Cfg>
int find_resident_clusters(const Target& target);

#define FLASHKDA_PREFILL_AS(Cfg, kGate)                                                         \
  template cudaError_t launch_instance<Cfg, kGate>(const Problem&, const Target&, cudaStream_t, \
                                                   const Share&)
#define FLASHKDA_PREFILL(kGate)       \
  FLASHKDA_PREFILL_AS(Whole, kGate);  \
  FLASHKDA_PREFILL_AS(Halves, kGate); \
  FLASHKDA_PREFILL_AS(Fed, kGate);    \
  FLASHKDA_PREFILL_AS(Apart, kGate);  \
  FLASHKDA_PREFILL_AS(Ample, kGate);  \
  FLASHKDA_PREFILL_AS(Helped, kGate); \
  FLASHKDA_PREFILL_AS(Threes, kGate)

}  // namespace flashkda::cuda::sm90::prefill
