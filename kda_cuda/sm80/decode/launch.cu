#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "kernel.cuh"
#include "launch.h"

namespace flashkda::cuda::sm80::decode {
namespace {

bool vectors_fit(const StateTensor& state) {
  const int64_t element = state.dtype == DType::kF32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(state.ptr) % 16 == 0 && state.stride_n * element % 16 == 0;
}

template <DType kIn, int K, bool kVFirst>
cudaError_t launch_kernel(const Params& params, int blocks, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = kThreads;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, recurrent_kda_kernel<kIn, K, kVFirst>, params);
}

template <DType kIn, int K>
cudaError_t choose_layout(const Params& params, int blocks, cudaStream_t stream) {
  return params.p.state_v_first ? launch_kernel<kIn, K, true>(params, blocks, stream)
                                : launch_kernel<kIn, K, false>(params, blocks, stream);
}

template <DType kIn>
cudaError_t choose_k(const Params& params, int blocks, cudaStream_t stream) {
  switch (params.p.K) {
    case 64:
      return choose_layout<kIn, 64>(params, blocks, stream);
    case 128:
      return choose_layout<kIn, 128>(params, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch(const Problem& p, const Pool& pool, int multiprocessors, cudaStream_t stream) {
  const int64_t items = p.N * p.HV * (p.V / kSliceV);
  if (items == 0) return cudaSuccess;
  if (p.V % kSliceV != 0 || items > INT32_MAX / 2) return cudaErrorInvalidValue;
  const Params params{p,
                      pool,
                      static_cast<int>(items),
                      Divider(p.V / kSliceV),
                      Divider(p.HV),
                      Divider(p.HV / p.H),
                      vectors_fit(p.initial_state),
                      vectors_fit(p.final_state)};
  const int blocks = std::min(params.items, multiprocessors * kBlocksPerSM);
  const DType in = p.initial_state.ptr != nullptr ? p.initial_state.dtype : p.final_state.dtype;
  return in == DType::kF32 ? choose_k<DType::kF32>(params, blocks, stream)
                           : choose_k<DType::kBF16>(params, blocks, stream);
}

}  // namespace flashkda::cuda::sm80::decode
