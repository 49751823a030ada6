#include "device.h"

#include <torch/headeronly/util/Exception.h>

#include <array>
#include <mutex>
#include <string>

#include "../common/served.h"

namespace flashkda::cuda {
namespace {

constexpr int kMaxDevices = 64;

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

const Device& device_properties(int index) {
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> read;
  STD_TORCH_CHECK(index >= 0 && index < kMaxDevices, "CUDA device ", index,
                  " was given, the first ", kMaxDevices, " are served");
  std::call_once(read[index], [index] {
    devices[index] = {attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
                          attribute(cudaDevAttrComputeCapabilityMinor, index),
                      attribute(cudaDevAttrMultiProcessorCount, index),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
  });
  return devices[index];
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
                    words(device_properties(device).capability), "; this build holds kernels for ",
                    served, ". Use a GPU of these, or build the package for yours.");
  }
  STD_TORCH_CHECK(false, op, " could not be launched: ", cudaGetErrorString(error));
}

}  // namespace flashkda::cuda
