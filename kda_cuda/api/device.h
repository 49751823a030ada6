// What the dispatch asks of a device, read once, and the words for a launch that failed.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/params.h"

namespace flashkda::cuda {

const Target& target_of(int device);

// Raises a sentence where a launch failed; one that names the capabilities served where none fits
// the device.
void check_launch(cudaError_t error, const char* op, int device);

}  // namespace flashkda::cuda
