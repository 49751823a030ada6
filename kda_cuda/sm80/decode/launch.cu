#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "kernel.cuh"
#include "launch.h"
#include "one_token.cuh"
#include "one_token_few.cuh"

namespace flashkda::cuda::sm80::decode {
namespace {

bool vectors_fit(const StateTensor& state) {
  const int64_t element = state.dtype == DType::kF32 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(state.ptr) % 16 == 0 && state.stride_n * element % 16 == 0;
}

Tokens pack(const TokenTensor& x) { return {x.ptr, x.stride_b, x.stride_t, x.stride_h}; }

States pack(const StateTensor& x) { return {x.ptr, x.stride_n, x.size}; }

template <class Enum>
uint8_t byte(Enum x) {
  return static_cast<uint8_t>(x);
}

Params pack(const Problem& p, const Pool& pool) {
  return {.log2_slices = p.V == 2 * kSliceV ? 1u : 2u,
          .N = static_cast<uint32_t>(p.N),
          .heads_per_key = SmallDivider(p.HV / p.H),
          .cu_seqlens = p.cu_seqlens,
          .state_indices = pool.state_indices,
          .initial_state = pack(p.initial_state),
          .final_state = pack(p.final_state),
          .T = p.T,
          .V = p.V,
          .q = pack(p.q),
          .k = pack(p.k),
          .g = pack(p.g),
          .v = pack(p.v),
          .beta = pack(p.beta),
          .o = pack(p.o),
          .A_log = p.A_log,
          .dt_bias = p.dt_bias,
          .scale = p.scale,
          .lower_bound = p.lower_bound,
          .gate = byte(p.gate),
          .beta_mode = byte(p.beta_mode),
          .l2norm = p.l2norm,
          .dtype = byte(p.q.dtype),
          .g_dtype = byte(p.g.dtype),
          .beta_dtype = byte(p.beta.dtype),
          .final_dtype = byte(p.final_state.dtype),
          .initial_aligned = vectors_fit(p.initial_state),
          .final_aligned = vectors_fit(p.final_state),
          .cu_seqlens_64 = p.cu_seqlens_64,
          .state_indices_64 = pool.state_indices_64,
          .accepted_64 = pool.num_accepted_tokens_64,
          .per_token = pool.per_token,
          .in_place = pool.in_place,
          .indices_stride_n = pool.stride_n,
          .indices_stride_t = pool.stride_t,
          .indices_width = pool.width,
          .num_accepted_tokens = pool.num_accepted_tokens};
}

// The grid: slices of heads, then sequences, of which a launch has any number.
dim3 blocks_for(const Problem& p, int columns) {
  constexpr int64_t kRows = 65535;
  return dim3(p.HV * (p.V / columns), static_cast<unsigned>(std::min(p.N, kRows)),
              static_cast<unsigned>((p.N + kRows - 1) / kRows));
}

// While the kernel before it in the stream ends, where the GPU can: see start_beside.
cudaError_t launch_beside(void (*kernel)(Params), dim3 blocks, const Params& params,
                          const Target& target, cudaStream_t stream) {
  cudaLaunchAttribute beside;
  beside.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  config.attrs = &beside;
  config.numAttrs = target.capability >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// All slices of kSliceV columns have a place on the GPU at once.
bool are_few(const Problem& p, const Target& target) {
  return p.N * p.HV * (p.V / kSliceV) <= int64_t{kFewBlocks} * target.multiprocessors;
}

template <DType kState, int K, bool kVFirst>
cudaError_t launch_one_token(const Problem& p, const Params& params, const Target& target,
                             cudaStream_t stream) {
  if (are_few(p, target)) {
    return launch_beside(one_token_few_kda_kernel<kState, K, kVFirst>, blocks_for(p, kSliceV),
                         params, target, stream);
  }
  constexpr auto kKernel = one_token_kda_kernel<kState, K, kVFirst>;
  // The states wait in shared memory: without as much of it as there is, too few blocks do.
  static std::atomic<bool> configured[kMaxDevices];
  if (!configured[target.device].load(std::memory_order_acquire)) {
    const cudaError_t error = cudaFuncSetAttribute(
        kKernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (error != cudaSuccess) return error;
    configured[target.device].store(true, std::memory_order_release);
  }
  return launch_beside(kKernel, blocks_for(p, kOneTokenColumns), params, target, stream);
}

template <DType kIn, int K, bool kVFirst>
cudaError_t choose_kernel(const Problem& p, const Params& params, const Target& target,
                          cudaStream_t stream) {
  const bool states_fit =
      (p.initial_state.ptr == nullptr || params.initial_aligned) &&
      (p.final_state.ptr == nullptr || (params.final_aligned && p.final_state.dtype == kIn));
  if (p.T == 1 && p.cu_seqlens == nullptr && !params.per_token && p.V == K && states_fit) {
    return launch_one_token<kIn, K, kVFirst>(p, params, target, stream);
  }
  return launch_beside(recurrent_kda_kernel<kIn, K, kVFirst>, blocks_for(p, kSliceV), params,
                       target, stream);
}

template <DType kIn, int K>
cudaError_t choose_layout(const Problem& p, const Params& params, const Target& target,
                          cudaStream_t stream) {
  return p.state_v_first ? choose_kernel<kIn, K, true>(p, params, target, stream)
                         : choose_kernel<kIn, K, false>(p, params, target, stream);
}

template <DType kIn>
cudaError_t choose_k(const Problem& p, const Params& params, const Target& target,
                     cudaStream_t stream) {
  switch (p.K) {
    case 64:
      return choose_layout<kIn, 64>(p, params, target, stream);
    case 128:
      return choose_layout<kIn, 128>(p, params, target, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch(const Problem& p, const Pool& pool, const Target& target, cudaStream_t stream) {
  if (p.N == 0) return cudaSuccess;
  // Elements of a row of states are counted in 32 bits, and SmallDivider has its limit.
  if ((p.V != 64 && p.V != 128) || p.HV >= (1 << 15) || p.N > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const Params params = pack(p, pool);
  const DType in = p.initial_state.ptr != nullptr ? p.initial_state.dtype : p.final_state.dtype;
  return in == DType::kF32 ? choose_k<DType::kF32>(p, params, target, stream)
                           : choose_k<DType::kBF16>(p, params, target, stream);
}

}  // namespace flashkda::cuda::sm80::decode
