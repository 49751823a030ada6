#include "../apart.cuh"
#include "../instantiations.h"

namespace flashkda::cuda::sm80::prefill {

FLASHKDA_PREFILL_APART(__nv_bfloat16);

}  // namespace flashkda::cuda::sm80::prefill
