#include "../instantiations.h"
#include "../kernel.cuh"

namespace flashkda::cuda::sm80::prefill {

FLASHKDA_PREFILL(__half, 128, 32);

}  // namespace flashkda::cuda::sm80::prefill
