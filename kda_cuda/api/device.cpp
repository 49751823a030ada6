#include "device.h"

#include <torch/headeronly/util/Exception.h>

#include <array>
#include <mutex>
#include <string>

#include "../common/served.h"

namespace flashkda::cuda {
namespace {

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, what, device);
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA device ", device,
                  " could not be asked for its properties: ", cudaGetErrorString(error));
  return value;
}

std::string words(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

}  // namespace

const Target& target_of(int device) {
  static std::array<Target, kMaxDevices> targets;
  static std::array<std::once_flag, kMaxDevices> read;
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "CUDA device ", device,
                  " was given, the first ", kMaxDevices, " are served");
  std::call_once(read[device], [device] {
    targets[device] = {device,
                       attribute(cudaDevAttrComputeCapabilityMajor, device) * 10 +
                           attribute(cudaDevAttrComputeCapabilityMinor, device),
                       attribute(cudaDevAttrMultiProcessorCount, device),
                       attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  });
  return targets[device];
}

void check_launch(cudaError_t error, const char* op, int device) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();
    std::string served;
    for (int capability : compiled_capabilities()) {
      served += (served.empty() ? "" : ", ") + words(capability);
    }
    STD_TORCH_CHECK(false, op, ": CUDA device ", device, " has compute capability ",
                    words(target_of(device).capability), "; this build holds kernels for ", served,
                    ". Use a GPU of these, or build the package for yours.");
  }
  STD_TORCH_CHECK(false, op, " could not be launched: ", cudaGetErrorString(error));
}

}  // namespace flashkda::cuda
