#include "served.h"

namespace flashkda::cuda {

std::vector<int> compiled_capabilities() {
  std::vector<int> capabilities;
  for (int arch : {__CUDA_ARCH_LIST__}) capabilities.push_back(arch / 10);
  return capabilities;
}

}  // namespace flashkda::cuda
