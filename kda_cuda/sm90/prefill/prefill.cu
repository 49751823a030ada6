#include "../../common/smem.h"
#include "kernel.cuh"
#include "maps.h"
#include "prefill.h"

namespace flashkda::cuda::sm90::prefill {
namespace {

template <class Cfg>
cudaError_t launch_instance(const Problem& p, const Target& target, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<Cfg>);
  Maps maps;
  cudaError_t error = make_maps(p, Cfg::VS, &maps);
  if (error == cudaSuccess) error = allow_smem<prefill_kernel<Cfg>>(kBytes, target.device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.N * p.HV * (p.V / Cfg::VS);
  prefill_kernel<Cfg><<<static_cast<unsigned>(blocks), Cfg::kThreads, kBytes, stream>>>(p, maps);
  return cudaGetLastError();
}

}  // namespace

bool serves(const Problem& p, const Target& target) {
  return target.capability == 90 && p.K == kChannels && p.V == kChannels &&
         p.q.dtype == DType::kBF16 && p.g.dtype != DType::kF16 && maps_fit(p) && stores_fit(p);
}

// A slice of V costs its head's factors once more, and leaves the factor warps more of the SM:
// worth it while SMs are idle. Results do not depend on it.
cudaError_t launch(const Problem& p, const Target& target, cudaStream_t stream) {
  if (p.N == 0 || p.HV == 0) return cudaSuccess;
  if (2 * p.N * p.HV <= target.multiprocessors) {
    return launch_instance<Config<64>>(p, target, stream);
  }
  return launch_instance<Config<128>>(p, target, stream);
}

}  // namespace flashkda::cuda::sm90::prefill
