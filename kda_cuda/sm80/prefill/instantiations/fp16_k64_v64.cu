#include "../instantiations.h"
#include "../kernel.cuh"

namespace flashkda::cuda::sm80::prefill {

FLASHKDA_PREFILL(__half, 64, 64);

}  // namespace flashkda::cuda::sm80::prefill
