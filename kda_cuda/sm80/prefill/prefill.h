// The portable prefill kernel's interface.
#pragma once

#include <cuda_runtime_api.h>

#include "../../common/params.h"

namespace flashkda::cuda::sm80::prefill {

// q, k, v in bf16 or fp16; K and V each 64 or 128. smem_limit: the device's opt-in shared memory of
// a block in bytes.
cudaError_t launch(const Problem& p, const Target& target, void* workspace, cudaStream_t stream);

// Bytes of global memory that `launch` needs beside the tensors, for as long as the kernel runs.
int64_t workspace_bytes(const Problem& p, const Target& target);

}  // namespace flashkda::cuda::sm80::prefill
