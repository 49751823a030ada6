// The recurrent kernel for every GPU from sm_80 on.
#pragma once

#include <cuda_runtime_api.h>

#include "../../common/params.h"

namespace flashkda::cuda::sm80::decode {

// K and V are 64 or 128. Needs no workspace; reads nothing on the host but its arguments.
cudaError_t launch(const Problem& p, const Pool& pool, const Target& target, cudaStream_t stream);

}  // namespace flashkda::cuda::sm80::decode
