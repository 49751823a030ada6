#include "../instantiations.h"
#include "../kernel.cuh"

namespace flashkda::cuda::sm90::prefill {

FLASHKDA_PREFILL(Gate::kSoftplus);

}  // namespace flashkda::cuda::sm90::prefill
