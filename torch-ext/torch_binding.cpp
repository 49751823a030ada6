// Op schemas, the CPU implementations on tensors, and the registration of both devices.
#include "torch_binding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../kda_cpu/kda_cpu.h"
#include "registration.h"
#include "repeat.h"
#if defined(CUDA_KERNEL)
#include "../kda_cuda/api/kda_api.h"
#endif

namespace flashkda::cpu {
namespace {

using torch::headeronly::ScalarType;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return DType::kF32;
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    default:
      STD_TORCH_CHECK(false, "flashkda on CPU takes float32, bfloat16 and float16 tensors, not ",
                      x.scalar_type());
  }
}

TokenTensor tokens(const Tensor& x) {
  const bool has_d = x.dim() == 4;
  return {x.data_ptr(), dtype_of(x), x.stride(0),
          x.stride(1),  x.stride(2), has_d ? x.stride(3) : 0};
}

StateTensor states(const std::optional<Tensor>& x) {
  if (!x) return {};
  return {x->data_ptr(), dtype_of(*x), x->stride(0), x->size(0)};
}

IndexTensor indices(const std::optional<Tensor>& x) {
  if (!x) return {};
  return {x->data_ptr(), x->scalar_type() == ScalarType::Long, x->stride(0),
          x->dim() == 2 ? x->stride(1) : 0};
}

const float* floats(const std::optional<Tensor>& x) {
  return x ? static_cast<const float*>(x->data_ptr()) : nullptr;
}

Problem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                   const Tensor& beta, const std::optional<Tensor>& A_log,
                   const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& initial_state,
                   const std::optional<Tensor>& cu_seqlens, const Tensor& o,
                   const std::optional<Tensor>& final_state, double scale, int64_t gate,
                   double lower_bound, int64_t beta_mode, bool l2norm, bool state_v_first) {
  Problem p;
  p.B = q.size(0);
  p.T = q.size(1);
  p.H = q.size(2);
  p.K = q.size(3);
  p.HV = v.size(2);
  p.V = v.size(3);
  p.N = cu_seqlens ? cu_seqlens->numel() - 1 : p.B;
  p.q = tokens(q);
  p.k = tokens(k);
  p.v = tokens(v);
  p.g = tokens(g);
  p.beta = tokens(beta);
  p.o = tokens(o);
  p.A_log = floats(A_log);
  p.dt_bias = floats(dt_bias);
  p.cu_seqlens = indices(cu_seqlens);
  p.initial_state = states(initial_state);
  p.final_state = states(final_state);
  p.state_v_first = state_v_first;
  p.scale = static_cast<float>(scale);
  p.gate = static_cast<Gate>(gate);
  p.lower_bound = static_cast<float>(lower_bound);
  p.beta_mode = static_cast<BetaMode>(beta_mode);
  p.l2norm = l2norm;
  return p;
}

Pool pool_of(const std::optional<Tensor>& state_indices,
             const std::optional<Tensor>& num_accepted_tokens, bool in_place) {
  Pool pool;
  pool.state_indices = indices(state_indices);
  pool.per_token = state_indices && state_indices->dim() == 2;
  pool.columns = pool.per_token ? state_indices->size(1) : 0;
  pool.num_accepted_tokens = indices(num_accepted_tokens);
  pool.in_place = in_place;
  return pool;
}

Checkpoints checkpoints_of(const std::optional<Tensor>& states,
                           const std::optional<Tensor>& offsets, const std::optional<Tensor>& rows,
                           int64_t interval) {
  return {flashkda::cpu::states(states), indices(offsets), indices(rows),
          offsets ? offsets->size(1) : 0, interval};
}

Threads torch_threads() {
  const int count = static_cast<int>(torch::stable::get_num_threads());
  return {count, [](int n, const std::function<void(int)>& body) {
            torch::stable::parallel_for(0, n, 1, [&body](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
            });
          }};
}

// The call that p describes, its tensors elsewhere.
Problem moved(Problem p, const Addresses& x) {
  p.q.data = x.q;
  p.k.data = x.k;
  p.v.data = x.v;
  p.g.data = x.g;
  p.beta.data = x.beta;
  p.o.data = x.o;
  p.A_log = static_cast<const float*>(x.A_log);
  p.dt_bias = static_cast<const float*>(x.dt_bias);
  p.cu_seqlens.data = x.cu_seqlens;
  p.initial_state.data = x.initial_state;
  p.final_state.data = x.final_state;
  p.state_indices.data = x.state_indices;
  return p;
}

Pool moved(Pool pool, const Addresses& x) {
  pool.state_indices.data = x.state_indices;
  pool.num_accepted_tokens.data = x.num_accepted_tokens;
  return pool;
}

void run_chunk(const Problem& p) { implementations().front().chunk_kda_fwd(p, torch_threads()); }

void run_recurrent(const Problem& p, const Pool& pool) {
  implementations().front().recurrent_kda_fwd(p, pool, torch_threads());
}

void chunk(const Problem& p) {
  run_chunk(p);
  if (p.checkpoints.states.data != nullptr) return;  // `moved` does not know their tensors
  remember([p](const Addresses& x) { run_chunk(moved(p, x)); });
}

void recurrent(const Problem& p, const Pool& pool) {
  run_recurrent(p, pool);
  remember([p, pool](const Addresses& x) { run_recurrent(moved(p, x), moved(pool, x)); });
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
  Problem p = problem_of(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, o,
                         final_state, scale, gate, lower_bound, beta_mode, l2norm, state_v_first);
  p.state_indices = indices(state_indices);
  p.checkpoints = checkpoints_of(checkpoint_states, checkpoint_offsets, checkpoint_indices,
                                 checkpoint_interval);
  chunk(p);
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
  Problem p = problem_of(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, o, state, scale, gate,
                         lower_bound, beta_mode, l2norm, state_v_first);
  p.state_indices = indices(state_indices);
  p.in_place = true;
  p.checkpoints = checkpoints_of(checkpoint_states, checkpoint_offsets, checkpoint_indices,
                                 checkpoint_interval);
  chunk(p);
}

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
      problem_of(q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, o, final_state, scale,
                 gate, lower_bound, beta_mode, l2norm, state_v_first);
  recurrent(p, pool_of(state_indices, num_accepted_tokens, false));
}

void recurrent_kda_pool_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                            const Tensor& beta, const std::optional<Tensor>& A_log,
                            const std::optional<Tensor>& dt_bias, Tensor state,
                            const std::optional<Tensor>& cu_seqlens,
                            const std::optional<Tensor>& state_indices,
                            const std::optional<Tensor>& num_accepted_tokens, Tensor o,
                            double scale, int64_t gate, double lower_bound, int64_t beta_mode,
                            bool l2norm, bool state_v_first) {
  const Problem p = problem_of(q, k, v, g, beta, A_log, dt_bias, state, cu_seqlens, o, state, scale,
                               gate, lower_bound, beta_mode, l2norm, state_v_first);
  recurrent(p, pool_of(state_indices, num_accepted_tokens, true));
}

}  // namespace flashkda::cpu

// The common tail of every op; docs/architecture.md says what the numbers mean.
#define FLASHKDA_CHOICES                                                                          \
  "float scale, int gate, float lower_bound, int beta_mode, bool l2norm, bool state_v_first) -> " \
  "()"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "chunk_kda_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? "
      "dt_bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, Tensor? state_indices, Tensor? "
      "checkpoint_offsets, "
      "Tensor? checkpoint_indices, Tensor(a!) o, Tensor(b!)? final_state, Tensor(c!)? "
      "checkpoint_states, "
      "int checkpoint_interval, " FLASHKDA_CHOICES);
  ops.def(
      "chunk_kda_pool_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, "
      "Tensor? dt_bias, Tensor(b!) state, Tensor? cu_seqlens, Tensor? state_indices, "
      "Tensor? checkpoint_offsets, Tensor? checkpoint_indices, Tensor(a!) o, "
      "Tensor(c!)? checkpoint_states, int checkpoint_interval, " FLASHKDA_CHOICES);
  ops.def(
      "recurrent_kda_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, "
      "Tensor? dt_bias, Tensor? initial_state, Tensor? cu_seqlens, Tensor? state_indices, "
      "Tensor? num_accepted_tokens, Tensor(a!) o, Tensor(b!)? final_state, " FLASHKDA_CHOICES);
  ops.def(
      "recurrent_kda_pool_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, "
      "Tensor? dt_bias, Tensor(b!) state, Tensor? cu_seqlens, Tensor? state_indices, "
      "Tensor? num_accepted_tokens, Tensor(a!) o, " FLASHKDA_CHOICES);
  ops.def("copy_tokens(Tensor x, Tensor(a!) to) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("chunk_kda_fwd", TORCH_BOX(&flashkda::cpu::chunk_kda_fwd));
  ops.impl("chunk_kda_pool_fwd", TORCH_BOX(&flashkda::cpu::chunk_kda_pool_fwd));
  ops.impl("recurrent_kda_fwd", TORCH_BOX(&flashkda::cpu::recurrent_kda_fwd));
  ops.impl("recurrent_kda_pool_fwd", TORCH_BOX(&flashkda::cpu::recurrent_kda_pool_fwd));
}

#if defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("chunk_kda_fwd", TORCH_BOX(&flashkda::cuda::chunk_kda_fwd));
  ops.impl("chunk_kda_pool_fwd", TORCH_BOX(&flashkda::cuda::chunk_kda_pool_fwd));
  ops.impl("recurrent_kda_fwd", TORCH_BOX(&flashkda::cuda::recurrent_kda_fwd));
  ops.impl("recurrent_kda_pool_fwd", TORCH_BOX(&flashkda::cuda::recurrent_kda_pool_fwd));
  ops.impl("copy_tokens", TORCH_BOX(&flashkda::cuda::copy_tokens));
}
#endif
