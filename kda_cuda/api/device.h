// What the dispatch asks of a device, read once, and the words for a launch that failed.
#pragma once

#include <cuda_runtime_api.h>

namespace flashkda::cuda {

struct Device {
  int capability;  // major * 10 + minor
  int multiprocessors;
  int smem_limit;  // opt-in shared memory of a block in bytes
};

const Device& device_properties(int index);

// Raises a sentence where a launch failed; one that names the capabilities served where none fits
// the device.
void check_launch(cudaError_t error, const char* op, int device);

}  // namespace flashkda::cuda
