#include "../instantiations.h"
#include "../kernel.cuh"

namespace flashkda::cuda::sm80::prefill {

FLASHKDA_PREFILL(__nv_bfloat16, 64, 64);

}  // namespace flashkda::cuda::sm80::prefill
