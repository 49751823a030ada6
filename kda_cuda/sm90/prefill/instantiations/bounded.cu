#include "../instantiations.h"
#include "../kernel.cuh"

namespace flashkda::cuda::sm90::prefill {

FLASHKDA_PREFILL(Gate::kBounded);

}  // namespace flashkda::cuda::sm90::prefill
