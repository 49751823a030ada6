#include "prefill.h"

#include "instantiations.h"

namespace flashkda::cuda::sm80::prefill {
namespace {

// Whether SMs would be idle that can make the chunks of those that walk heads (apart.cuh).
bool is_apart(const Problem& p, const Target& target) {
  return p.K == 128 && p.N * p.HV * (kApartMakers + p.V / kApartSlice) <= target.multiprocessors;
}

// A slice of V costs its head's factors once more, and leaves the producers more of the SM: worth
// it while SMs are idle. Results do not depend on how heads are shared among blocks.
template <class Elem>
cudaError_t launch_for(const Problem& p, const Target& target, void* workspace,
                       cudaStream_t stream) {
  if (p.K == 64) return launch_instance<PrefillConfig<Elem, 64, 64>>(p, target, stream);
  if (is_apart(p, target)) return launch_apart<ApartConfig<Elem>>(p, target, workspace, stream);
  if (p.V == 64 || p.N * p.HV * (p.V / 64) <= target.multiprocessors)
    return launch_instance<PrefillConfig<Elem, 128, 64>>(p, target, stream);
  return launch_instance<PrefillConfig<Elem, 128, 128>>(p, target, stream);
}

}  // namespace

int64_t workspace_bytes(const Problem& p, const Target& target) {
  return is_apart(p, target) ? ApartLayout<ApartConfig<__nv_bfloat16>>(p.N * p.HV).bytes() : 0;
}

cudaError_t launch(const Problem& p, const Target& target, void* workspace, cudaStream_t stream) {
  if (p.N == 0 || p.HV == 0) return cudaSuccess;
  return p.q.dtype == DType::kBF16 ? launch_for<__nv_bfloat16>(p, target, workspace, stream)
                                   : launch_for<__half>(p, target, workspace, stream);
}

}  // namespace flashkda::cuda::sm80::prefill
