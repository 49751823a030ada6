// Shared memory past what a kernel gets unasked.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "params.h"

namespace flashkda::cuda {

// Lets a kernel have that many bytes of dynamic shared memory, always the same on a device. Once a
// device: asking the driver costs more than the rest of a launch's preparation.
template <auto kKernel>
cudaError_t allow_smem(size_t bytes, int device) {
  static std::atomic<bool> configured[kMaxDevices];
  if (configured[device].load(std::memory_order_acquire)) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) configured[device].store(true, std::memory_order_release);
  return error;
}

}  // namespace flashkda::cuda
