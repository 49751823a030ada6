// The portable prefill kernel's interface.
#pragma once

#include <cuda_runtime_api.h>

#include "../../common/params.h"

namespace flashkda::cuda::sm80::prefill {

// q, k, v in bf16 or fp16; K and V each 64 or 128. smem_limit: the device's opt-in shared memory of
// a block in bytes.
cudaError_t launch(const Problem& p, const Target& target, cudaStream_t stream);

}  // namespace flashkda::cuda::sm80::prefill
