// From checked torch tensors to what kernels are told (common/params.h).
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "../../torch-ext/repeat.h"
#include "../common/params.h"

// The shim declares it only where USE_CUDA is defined, which the stable ABI's compile flags do not
// do.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                             void** ret_stream);

namespace flashkda::cuda {

using torch::stable::Tensor;

// Makes a device current for a scope and holds that device's current stream.
class __attribute__((visibility("hidden"))) Launch {
 public:
  explicit Launch(int device) : guard_(device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline DType to_dtype(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kF32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBF16;
    case torch::headeronly::ScalarType::Half:
      return DType::kF16;
    default:
      STD_TORCH_CHECK(false, name,
                      " must be float32, bfloat16 or float16 on CUDA; convert it first");
  }
}

inline bool is_int64(const Tensor& x) {
  return x.scalar_type() == torch::headeronly::ScalarType::Long;
}

// x is [B, T, heads, D], or [B, T, heads] for beta.
inline TokenTensor to_token_tensor(const Tensor& x, const char* name) {
  TokenTensor out;
  out.ptr = x.data_ptr();
  out.dtype = to_dtype(x, name);
  out.stride_b = x.stride(0);
  out.stride_t = x.stride(1);
  out.stride_h = x.stride(2);
  return out;
}

inline StateTensor to_state_tensor(const std::optional<Tensor>& x, const char* name) {
  StateTensor out;
  if (!x.has_value()) return out;
  out.ptr = x->data_ptr();
  out.dtype = to_dtype(*x, name);
  out.stride_n = x->stride(0);
  out.size = x->size(0);
  return out;
}

inline IndexTensor to_index_tensor(const std::optional<Tensor>& x) {
  IndexTensor out;
  if (!x.has_value()) return out;
  out.ptr = x->data_ptr();
  out.is_64 = is_int64(*x);
  out.stride_n = x->stride(0);
  if (x->dim() == 2) out.stride_c = x->stride(1);
  return out;
}

inline Checkpoints to_checkpoints(const std::optional<Tensor>& states,
                                  const std::optional<Tensor>& offsets,
                                  const std::optional<Tensor>& indices, int64_t interval) {
  Checkpoints out;
  out.states = to_state_tensor(states, "checkpoint_states");
  out.offsets = to_index_tensor(offsets);
  out.indices = to_index_tensor(indices);
  if (offsets.has_value()) out.C = static_cast<int>(offsets->size(1));
  out.interval = static_cast<int>(interval);
  return out;
}

inline Problem to_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                          const Tensor& beta, const std::optional<Tensor>& A_log,
                          const std::optional<Tensor>& dt_bias,
                          const std::optional<Tensor>& initial_state,
                          const std::optional<Tensor>& cu_seqlens, const Tensor& o,
                          const std::optional<Tensor>& final_state, double scale, int64_t gate,
                          double lower_bound, int64_t beta_mode, bool l2norm, bool state_v_first) {
  Problem p;
  p.B = q.size(0);
  p.T = q.size(1);
  p.N = cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : p.B;
  p.H = static_cast<int>(q.size(2));
  p.HV = static_cast<int>(v.size(2));
  p.K = static_cast<int>(q.size(3));
  p.V = static_cast<int>(v.size(3));
  p.q = to_token_tensor(q, "q");
  p.k = to_token_tensor(k, "k");
  p.v = to_token_tensor(v, "v");
  p.g = to_token_tensor(g, "g");
  p.beta = to_token_tensor(beta, "beta");
  p.o = to_token_tensor(o, "o");
  if (A_log.has_value()) p.A_log = static_cast<const float*>(A_log->data_ptr());
  if (dt_bias.has_value()) p.dt_bias = static_cast<const float*>(dt_bias->data_ptr());
  if (cu_seqlens.has_value()) {
    p.cu_seqlens = cu_seqlens->data_ptr();
    p.cu_seqlens_64 = is_int64(*cu_seqlens);
  }
  p.initial_state = to_state_tensor(initial_state, "initial_state");
  p.final_state = to_state_tensor(final_state, "final_state");
  p.state_v_first = state_v_first;
  p.scale = static_cast<float>(scale);
  p.gate = static_cast<Gate>(gate);
  p.lower_bound = static_cast<float>(lower_bound);
  p.beta_mode = static_cast<BetaMode>(beta_mode);
  p.l2norm = l2norm;
  return p;
}

// The call that p describes, its tensors elsewhere.
inline Problem moved(Problem p, const Addresses& x) {
  p.q.ptr = x.q;
  p.k.ptr = x.k;
  p.v.ptr = x.v;
  p.g.ptr = x.g;
  p.beta.ptr = x.beta;
  p.o.ptr = x.o;
  p.A_log = static_cast<const float*>(x.A_log);
  p.dt_bias = static_cast<const float*>(x.dt_bias);
  p.cu_seqlens = x.cu_seqlens;
  p.initial_state.ptr = x.initial_state;
  p.final_state.ptr = x.final_state;
  p.state_indices.ptr = x.state_indices;
  return p;
}

}  // namespace flashkda::cuda
