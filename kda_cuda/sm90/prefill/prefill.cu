#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <limits>

#include "../../common/smem.h"
#include "kernel.cuh"
#include "maps.h"
#include "prefill.h"

namespace flashkda::cuda::sm90::prefill {
namespace {

template <class Cfg>
unsigned blocks_for(const Problem& p) {
  return static_cast<unsigned>(p.N * p.HV / Cfg::kHeads * Cfg::kCluster);
}

template <class Cfg>
cudaError_t launch_instance(const Problem& p, const Target& target, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<Cfg>);
  Maps maps;
  cudaError_t error = make_maps(p, Cfg::VS, &maps);
  if (error == cudaSuccess) error = allow_smem<prefill_kernel<Cfg>>(kBytes, target.device);
  if (error != cudaSuccess) return error;
  prefill_kernel<Cfg><<<blocks_for<Cfg>(p), Cfg::kThreads, kBytes, stream>>>(p, maps);
  return cudaGetLastError();
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

// A step's time in units of 10 ns, as measured, by the rounds that all chains take.
template <class Cfg>
int64_t cost(const Problem& p, const Target& target, int step) {
  const int64_t resident = resident_clusters<Cfg>(target);
  if (resident == 0 || p.HV % Cfg::kHeads != 0) return std::numeric_limits<int64_t>::max();
  const int64_t clusters = p.N * p.HV / Cfg::kHeads;
  return (clusters + resident - 1) / resident * step;
}

}  // namespace

bool serves(const Problem& p, const Target& target) {
  return target.capability == 90 && p.K == kChannels && p.V == kChannels &&
         p.q.dtype == DType::kBF16 && p.g.dtype != DType::kF16 && maps_fit(p) && stores_fit(p);
}

// Chains are what takes the time. Where SMs would be idle, they take shares of a head's chain and
// of the making of chunks; results do not depend on it.
cudaError_t launch(const Problem& p, const Target& target, cudaStream_t stream) {
  if (p.N == 0 || p.HV == 0) return cudaSuccess;
  const int64_t costs[] = {cost<Whole>(p, target, 240), cost<Halves>(p, target, 144),
                           cost<Fed>(p, target, 95), cost<Threes>(p, target, 190)};
  switch (std::min_element(std::begin(costs), std::end(costs)) - std::begin(costs)) {
    case 1:
      return launch_instance<Halves>(p, target, stream);
    case 2:
      return launch_instance<Fed>(p, target, stream);
    case 3:
      return launch_instance<Threes>(p, target, stream);
    default:
      return launch_instance<Whole>(p, target, stream);
  }
}

}  // namespace flashkda::cuda::sm90::prefill
