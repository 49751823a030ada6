#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

#include "../../common/smem.h"
#include "kernel.cuh"
#include "maps.h"
#include "prefill.h"

namespace flashkda::cuda::sm90::prefill {
namespace {

// Heads are counted through all sequences. beside: may run while the grid before it does.
template <class Cfg>
cudaError_t launch_heads(const Problem& p, const Target& target, cudaStream_t stream,
                         int64_t first_head, int64_t heads, bool beside = false) {
  constexpr int kBytes = sizeof(Shared<Cfg>);
  Maps maps;
  cudaError_t error = make_maps(p, Cfg::VS, &maps);
  if (error == cudaSuccess) error = allow_smem<prefill_kernel<Cfg>>(kBytes, target.device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(heads / Cfg::kHeads * Cfg::kCluster));
  config.blockDim = dim3(Cfg::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = beside ? 1 : 0;
  return cudaLaunchKernelEx(&config, prefill_kernel<Cfg>, p, maps, static_cast<int>(first_head));
}

// How many clusters the GPU holds at once, which depends on how its SMs are grouped; 0: none.
template <class Cfg>
int resident_clusters(const Target& target) {
  if (Cfg::kCluster == 1) return target.multiprocessors;
  static std::atomic<int> known[kMaxDevices];  // plus one
  int clusters = known[target.device].load(std::memory_order_relaxed) - 1;
  if (clusters >= 0) return clusters;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Cfg::kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(target.multiprocessors / Cfg::kCluster * Cfg::kCluster);
  config.blockDim = dim3(Cfg::kThreads);
  config.dynamicSmemBytes = sizeof(Shared<Cfg>);
  config.attrs = &cluster;
  config.numAttrs = 1;
  const bool found =
      allow_smem<prefill_kernel<Cfg>>(sizeof(Shared<Cfg>), target.device) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, prefill_kernel<Cfg>, &config) == cudaSuccess;
  if (!found) {
    cudaGetLastError();  // it is not the launch's
    clusters = 0;
  }
  known[target.device].store(clusters + 1, std::memory_order_relaxed);
  return clusters;
}

// A step's time in units of 10 ns, as measured, times the rounds that all heads take.
template <class Cfg>
int64_t cost(int64_t heads, const Target& target, int step) {
  const int64_t resident = int64_t{resident_clusters<Cfg>(target)} * Cfg::kHeads;
  if (resident == 0) return std::numeric_limits<int64_t>::max();
  return (heads + resident - 1) / resident * step;
}

// How many of the heads Threes takes, in one round, if pairs of the SMs that its clusters leave
// idle can take the others; 0 if they cannot.
int64_t heads_by_threes(const Problem& p, int64_t heads, const Target& target) {
  if (p.HV % Threes::kHeads != 0) return 0;
  const int64_t clusters =
      std::min(int64_t{resident_clusters<Threes>(target)}, heads / Threes::kHeads);
  const int64_t others = heads - clusters * Threes::kHeads;
  const int64_t idle = target.multiprocessors - clusters * Threes::kCluster;
  return others * Halves::kCluster <= idle ? clusters * Threes::kHeads : 0;
}

}  // namespace

bool serves(const Problem& p, const Target& target) {
  return target.capability == 90 && p.K == kChannels && p.V == kChannels &&
         p.q.dtype == DType::kBF16 && p.g.dtype != DType::kF16 && maps_fit(p);
}

// Chains are what takes the time. Where SMs would be idle, they take shares of a head's chain and
// of the making of chunks; results do not depend on it.
cudaError_t launch(const Problem& p, const Target& target, cudaStream_t stream) {
  if (p.N == 0 || p.HV == 0) return cudaSuccess;
  const int64_t heads = p.N * p.HV;
  const int64_t whole = cost<Whole>(heads, target, 240);
  const int64_t halves = cost<Halves>(heads, target, 143);
  const int64_t helped = cost<Helped>(heads, target, 117);
  const int64_t fed = cost<Fed>(heads, target, 95);
  const int64_t by_threes = heads_by_threes(p, heads, target);
  const int64_t threes = by_threes > 0 ? 205 : std::numeric_limits<int64_t>::max();
  const int64_t best = std::min({whole, halves, helped, fed, threes});
  if (best == threes) {
    const cudaError_t error = launch_heads<Threes>(p, target, stream, 0, by_threes);
    if (error != cudaSuccess || by_threes == heads) return error;
    return launch_heads<Halves>(p, target, stream, by_threes, heads - by_threes, true);
  }
  if (best == fed) return launch_heads<Fed>(p, target, stream, 0, heads);
  if (best == helped) return launch_heads<Helped>(p, target, stream, 0, heads);
  if (best == halves) return launch_heads<Halves>(p, target, stream, 0, heads);
  return launch_heads<Whole>(p, target, stream, 0, heads);
}

}  // namespace flashkda::cuda::sm90::prefill
