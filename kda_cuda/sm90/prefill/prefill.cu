#include "../../common/smem.h"
#include "kernel.cuh"
#include "maps.h"
#include "prefill.h"

namespace flashkda::cuda::sm90::prefill {
namespace {

template <class Cfg>
cudaError_t launch_instance(const Problem& p, const Maps& maps, const Target& target,
                            cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<Cfg>);
  const cudaError_t error = allow_smem<prefill_kernel<Cfg>>(kBytes, target.device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.N * p.HV * (p.V / Cfg::VS);
  prefill_kernel<Cfg><<<static_cast<unsigned>(blocks), Cfg::kThreads, kBytes, stream>>>(p, maps);
  return cudaGetLastError();
}

}  // namespace

bool serves(const Problem& p, const Target& target) {
  // Gates without a bound may be steep chunk after chunk, where this kernel is right but slow: a
  // square warp then makes A and M alone, at three times the portable kernel's time
  // (docs/performance.md).
  return target.capability == 90 && p.K == kChannels && p.V == kChannels &&
         p.q.dtype == DType::kBF16 && p.gate == Gate::kBounded && maps_fit(p) && stores_fit(p);
}

// A slice of V costs its head's factors once more, and leaves the factor warps more of the SM:
// worth it while SMs are idle. Results do not depend on it.
cudaError_t launch(const Problem& p, const Target& target, cudaStream_t stream) {
  if (p.N == 0 || p.HV == 0) return cudaSuccess;
  Maps maps;
  const cudaError_t error = make_maps(p, &maps);
  if (error != cudaSuccess) return error;
  if (2 * p.N * p.HV <= target.multiprocessors) {
    return launch_instance<Config<64>>(p, maps, target, stream);
  }
  return launch_instance<Config<128>>(p, maps, target, stream);
}

}  // namespace flashkda::cuda::sm90::prefill
