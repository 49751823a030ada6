#include "../apart.cuh"
#include "../instantiations.h"

namespace flashkda::cuda::sm80::prefill {

FLASHKDA_PREFILL_APART(__half);

}  // namespace flashkda::cuda::sm80::prefill
