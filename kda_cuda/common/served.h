// Which GPUs the compiled code serves.
#pragma once

#include <vector>

namespace flashkda::cuda {

// Compute capabilities that machine code was compiled for, as major * 10 + minor.
std::vector<int> compiled_capabilities();

}  // namespace flashkda::cuda
