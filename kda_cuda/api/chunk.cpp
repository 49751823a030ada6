// The prefill op on tensors, and the one place that chooses its kernel.
#include <torch/csrc/stable/ops.h>

#include <cstdlib>

#include "../sm80/prefill/prefill.h"
#include "../sm90/prefill/prefill.h"
#include "convert.h"
#include "device.h"
#include "kda_api.h"

namespace flashkda::cuda {
namespace {

// FLASHKDA_PORTABLE=1 leaves the choice to the kernel that runs everywhere: for tests, and for who
// looks for the cause of a difference.
bool wants_portable() {
  const char* value = std::getenv("FLASHKDA_PORTABLE");
  return value != nullptr && value[0] == '1';
}

// What comes from torch's allocator may be given back once the kernel is in its stream: what
// follows there follows the kernel.
Tensor workspace_of(int64_t bytes, int device) {
  return torch::stable::empty(
      {bytes}, torch::headeronly::ScalarType::Byte, torch::headeronly::Layout::Strided,
      torch::stable::Device(torch::headeronly::DeviceType::CUDA, device), false);
}

cudaError_t dispatch(const Problem& p, const Target& target, cudaStream_t stream) {
  const bool hopper = sm90::prefill::serves(p, target) && !wants_portable();
  const auto launch = hopper ? sm90::prefill::launch : sm80::prefill::launch;
  const int64_t bytes = hopper ? sm90::prefill::workspace_bytes(p, target)
                               : sm80::prefill::workspace_bytes(p, target);
  if (bytes == 0) return launch(p, target, nullptr, stream);
  const Tensor workspace = workspace_of(bytes, target.device);
  return launch(p, target, workspace.data_ptr(), stream);
}

void run(const Problem& p, int device) {
  const Launch launch(device);
  check_launch(dispatch(p, target_of(device), launch.stream()), "chunk_kda", device);
}

void chunk(const Problem& p, const Tensor& q) {
  const int device = q.get_device_index();
  run(p, device);
  if (p.checkpoints.states.ptr != nullptr) return;  // `moved` does not know their tensors
  remember([p, device](const Addresses& x) { run(moved(p, x), device); });
}

}  // namespace

void chunk_kda_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                   const Tensor& beta, const std::optional<Tensor>& A_log,
                   const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& initial_state,
                   const std::optional<Tensor>& cu_seqlens,
                   const std::optional<Tensor>& state_indices,
                   const std::optional<Tensor>& checkpoint_offsets,
                   const std::optional<Tensor>& checkpoint_indices, Tensor o,
                   std::optional<Tensor> final_state, std::optional<Tensor> checkpoint_states,
                   int64_t checkpoint_interval, double scale, int64_t gate, double lower_bound,
                   int64_t beta_mode, bool l2norm, bool state_v_first) {
  Problem p = to_problem(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, o,
                         final_state, scale, gate, lower_bound, beta_mode, l2norm, state_v_first);
  p.state_indices = to_index_tensor(state_indices);
  p.checkpoints = to_checkpoints(checkpoint_states, checkpoint_offsets, checkpoint_indices,
                                 checkpoint_interval);
  chunk(p, q);
}

void chunk_kda_pool_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                        const Tensor& beta, const std::optional<Tensor>& A_log,
                        const std::optional<Tensor>& dt_bias, Tensor state,
                        const std::optional<Tensor>& cu_seqlens,
                        const std::optional<Tensor>& state_indices,
                        const std::optional<Tensor>& checkpoint_offsets,
                        const std::optional<Tensor>& checkpoint_indices, Tensor o,
                        std::optional<Tensor> checkpoint_states, int64_t checkpoint_interval,
                        double scale, int64_t gate, double lower_bound, int64_t beta_mode,
                        bool l2norm, bool state_v_first) {
  Problem p = to_problem(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, o, state, scale, gate,
                         lower_bound, beta_mode, l2norm, state_v_first);
  p.state_indices = to_index_tensor(state_indices);
  p.in_place = true;
  p.checkpoints = to_checkpoints(checkpoint_states, checkpoint_offsets, checkpoint_indices,
                                 checkpoint_interval);
  chunk(p, q);
}

}  // namespace flashkda::cuda
