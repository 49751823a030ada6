// The recurrent ops on tensors.
#include "../sm80/decode/launch.h"
#include "convert.h"
#include "device.h"
#include "kda_api.h"

namespace flashkda::cuda {
namespace {

Pool to_pool(const std::optional<Tensor>& state_indices,
             const std::optional<Tensor>& num_accepted_tokens, bool in_place) {
  Pool pool;
  if (state_indices.has_value()) {
    pool.state_indices = state_indices->data_ptr();
    pool.state_indices_64 = is_int64(*state_indices);
    pool.stride_n = state_indices->stride(0);
    pool.per_token = state_indices->dim() == 2;
    if (pool.per_token) {
      pool.stride_t = state_indices->stride(1);
      pool.width = state_indices->size(1);
    }
  }
  if (num_accepted_tokens.has_value()) {
    pool.num_accepted_tokens = num_accepted_tokens->data_ptr();
    pool.num_accepted_tokens_64 = is_int64(*num_accepted_tokens);
  }
  pool.in_place = in_place;
  return pool;
}

Pool moved(Pool pool, const Addresses& x) {
  pool.state_indices = x.state_indices;
  pool.num_accepted_tokens = x.num_accepted_tokens;
  return pool;
}

void run(const Problem& p, const Pool& pool, int device) {
  const Launch launch(device);
  check_launch(sm80::decode::launch(p, pool, target_of(device), launch.stream()),
               "fused_recurrent_kda", device);
}

void recurrent(const Problem& p, const Pool& pool, const Tensor& q) {
  const int device = q.get_device_index();
  run(p, pool, device);
  remember([p, pool, device](const Addresses& x) { run(moved(p, x), moved(pool, x), device); });
}

}  // namespace

void recurrent_kda_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                       const Tensor& beta, const std::optional<Tensor>& A_log,
                       const std::optional<Tensor>& dt_bias,
                       const std::optional<Tensor>& initial_state,
                       const std::optional<Tensor>& cu_seqlens,
                       const std::optional<Tensor>& state_indices,
                       const std::optional<Tensor>& num_accepted_tokens, Tensor o,
                       std::optional<Tensor> final_state, double scale, int64_t gate,
                       double lower_bound, int64_t beta_mode, bool l2norm, bool state_v_first) {
  const Problem p =
      to_problem(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, o, final_state, scale,
                 gate, lower_bound, beta_mode, l2norm, state_v_first);
  recurrent(p, to_pool(state_indices, num_accepted_tokens, false), q);
}

void recurrent_kda_pool_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                            const Tensor& beta, const std::optional<Tensor>& A_log,
                            const std::optional<Tensor>& dt_bias, Tensor state,
                            const std::optional<Tensor>& cu_seqlens,
                            const std::optional<Tensor>& state_indices,
                            const std::optional<Tensor>& num_accepted_tokens, Tensor o,
                            double scale, int64_t gate, double lower_bound, int64_t beta_mode,
                            bool l2norm, bool state_v_first) {
  const Problem p = to_problem(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, o, state, scale,
                               gate, lower_bound, beta_mode, l2norm, state_v_first);
  recurrent(p, to_pool(state_indices, num_accepted_tokens, true), q);
}

}  // namespace flashkda::cuda
