// The Hopper prefill kernel's interface.
#pragma once

#include <cuda_runtime_api.h>

#include "../../common/params.h"

namespace flashkda::cuda::sm90::prefill {

// Whether this kernel takes the problem; the portable one takes all.
bool serves(const Problem& p, const Target& target);

// Bytes of global memory that `launch` needs beside the tensors, for as long as the kernel runs.
int64_t workspace_bytes(const Problem& p, const Target& target);

cudaError_t launch(const Problem& p, const Target& target, void* workspace, cudaStream_t stream);

}  // namespace flashkda::cuda::sm90::prefill
