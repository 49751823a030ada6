#include "prefill.h"

#include "instantiations.h"

namespace flashkda::cuda::sm80::prefill {
namespace {

template <class Elem>
cudaError_t launch_for(const Problem& p, const Target& target, cudaStream_t stream) {
  if (p.K == 64) return launch_instance<PrefillConfig<Elem, 64, 64>>(p, target, stream);
  // Half the columns a block make a step shorter, and cost each head's factors twice: only where
  // SMs are left over.
  const bool spare = 2 * p.N * p.HV <= target.multiprocessors;
  if (p.V == 64 || spare) return launch_instance<PrefillConfig<Elem, 128, 64>>(p, target, stream);
  return launch_instance<PrefillConfig<Elem, 128, 128>>(p, target, stream);
}

}  // namespace

cudaError_t launch(const Problem& p, const Target& target, cudaStream_t stream) {
  if (p.N == 0 || p.HV == 0) return cudaSuccess;
  return p.q.dtype == DType::kBF16 ? launch_for<__nv_bfloat16>(p, target, stream)
                                   : launch_for<__half>(p, target, stream);
}

}  // namespace flashkda::cuda::sm80::prefill
