// One launcher an instantiation, each compiled in a file of its own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "config.h"

namespace flashkda::cuda::sm80::prefill {

template <class Cfg>
cudaError_t launch_instance(const Problem& p, const Target& target, cudaStream_t stream);

// The same by blocks that are apart.
template <class Cfg>
cudaError_t launch_apart(const Problem& p, const Target& target, void* workspace,
                         cudaStream_t stream);

#define FLASHKDA_PREFILL(Elem, K, VS)                                                             \
  template cudaError_t launch_instance<PrefillConfig<Elem, K, VS>>(const Problem&, const Target&, \
                                                                   cudaStream_t)

#define FLASHKDA_PREFILL_APART(Elem)                                                         \
  template cudaError_t launch_apart<ApartConfig<Elem>>(const Problem&, const Target&, void*, \
                                                       cudaStream_t)

extern FLASHKDA_PREFILL(__nv_bfloat16, 128, 128);
extern FLASHKDA_PREFILL(__nv_bfloat16, 128, 64);
extern FLASHKDA_PREFILL(__nv_bfloat16, 64, 64);
extern FLASHKDA_PREFILL(__half, 128, 128);
extern FLASHKDA_PREFILL(__half, 128, 64);
extern FLASHKDA_PREFILL(__half, 64, 64);
extern FLASHKDA_PREFILL_APART(__nv_bfloat16);
extern FLASHKDA_PREFILL_APART(__half);

}  // namespace flashkda::cuda::sm80::prefill
