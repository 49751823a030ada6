#include "prefill.h"

#include "instantiations.h"

namespace flashkda::cuda::sm80::prefill {
namespace {

template <class Elem>
cudaError_t launch_for(const Problem& p, int smem_limit, int multiprocessors, cudaStream_t stream) {
  if (p.K == 64) return launch_instance<PrefillConfig<Elem, 64, 64>>(p, smem_limit, stream);
  // Half the columns a block make a step shorter, and cost each head's factors twice: only where
  // SMs are left over.
  const bool spare = 2 * p.N * p.HV <= multiprocessors;
  if (p.V == 64 || spare)
    return launch_instance<PrefillConfig<Elem, 128, 64>>(p, smem_limit, stream);
  return launch_instance<PrefillConfig<Elem, 128, 128>>(p, smem_limit, stream);
}

}  // namespace

cudaError_t launch(const Problem& p, int smem_limit, int multiprocessors, cudaStream_t stream) {
  if (p.N == 0 || p.HV == 0) return cudaSuccess;
  return p.q.dtype == DType::kBF16
             ? launch_for<__nv_bfloat16>(p, smem_limit, multiprocessors, stream)
             : launch_for<__half>(p, smem_limit, multiprocessors, stream);
}

}  // namespace flashkda::cuda::sm80::prefill
