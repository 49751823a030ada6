// The CUDA implementations of the package's ops, as torch_binding.cpp registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace flashkda::cuda {

using torch::stable::Tensor;

void chunk_kda_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                   const Tensor& beta, const std::optional<Tensor>& A_log,
                   const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& initial_state,
                   const std::optional<Tensor>& cu_seqlens,
                   const std::optional<Tensor>& state_indices,
                   const std::optional<Tensor>& checkpoint_offsets,
                   const std::optional<Tensor>& checkpoint_indices, Tensor o,
                   std::optional<Tensor> final_state, std::optional<Tensor> checkpoint_states,
                   int64_t checkpoint_interval, double scale, int64_t gate, double lower_bound,
                   int64_t beta_mode, bool l2norm, bool state_v_first);

void chunk_kda_pool_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                        const Tensor& beta, const std::optional<Tensor>& A_log,
                        const std::optional<Tensor>& dt_bias, Tensor state,
                        const std::optional<Tensor>& cu_seqlens,
                        const std::optional<Tensor>& state_indices,
                        const std::optional<Tensor>& checkpoint_offsets,
                        const std::optional<Tensor>& checkpoint_indices, Tensor o,
                        std::optional<Tensor> checkpoint_states, int64_t checkpoint_interval,
                        double scale, int64_t gate, double lower_bound, int64_t beta_mode,
                        bool l2norm, bool state_v_first);

void recurrent_kda_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                       const Tensor& beta, const std::optional<Tensor>& A_log,
                       const std::optional<Tensor>& dt_bias,
                       const std::optional<Tensor>& initial_state,
                       const std::optional<Tensor>& cu_seqlens,
                       const std::optional<Tensor>& state_indices,
                       const std::optional<Tensor>& num_accepted_tokens, Tensor o,
                       std::optional<Tensor> final_state, double scale, int64_t gate,
                       double lower_bound, int64_t beta_mode, bool l2norm, bool state_v_first);

void recurrent_kda_pool_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                            const Tensor& beta, const std::optional<Tensor>& A_log,
                            const std::optional<Tensor>& dt_bias, Tensor state,
                            const std::optional<Tensor>& cu_seqlens,
                            const std::optional<Tensor>& state_indices,
                            const std::optional<Tensor>& num_accepted_tokens, Tensor o,
                            double scale, int64_t gate, double lower_bound, int64_t beta_mode,
                            bool l2norm, bool state_v_first);

void copy_tokens(const Tensor& x, Tensor to);

}  // namespace flashkda::cuda
