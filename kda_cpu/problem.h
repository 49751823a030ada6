// What the CPU kernels are told: plain pointers, strides and choices, all checked before they get
// here.
#pragma once

#include <cstdint>

namespace flashkda::cpu {

enum class DType : int { kF32, kBF16, kF16 };
enum class Gate : int { kGiven, kSoftplus, kBounded };
enum class BetaMode : int { kGiven, kSigmoid, kTwiceSigmoid };

// A [B, T, heads, D] tensor with any strides, counted in elements. beta is [B, T, heads]: its
// stride_d is not used.
struct TokenTensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride_b = 0;
  int64_t stride_t = 0;
  int64_t stride_h = 0;
  int64_t stride_d = 1;
};

// A [rows, HV, K, V] tensor (or [rows, HV, V, K]), contiguous but for its first dimension; data is
// null where absent.
struct StateTensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride_n = 0;
  int64_t rows = 0;
};

// A tensor of int32 or int64 with at most two dimensions; data is null where absent.
struct IndexTensor {
  const void* data = nullptr;
  bool is_64 = false;
  int64_t stride_n = 0;
  int64_t stride_t = 0;

  int64_t at(int64_t n, int64_t t = 0) const {
    const int64_t offset = n * stride_n + t * stride_t;
    return is_64 ? static_cast<const int64_t*>(data)[offset]
                 : static_cast<const int32_t*>(data)[offset];
  }
};

// States inside a sequence that prefill keeps (docs/architecture.md, chunk_kda_fwd). Either
// `offsets` or `interval` is given.
struct Checkpoints {
  StateTensor states;   // [rows, HV, K, V]; null: none are kept. Here fp16 is a dtype as well
  IndexTensor offsets;  // [N, C]: how many tokens of the sequence come before the checkpoint
  IndexTensor indices;  // [N, C]: its row of states; null: n * C + c
  int64_t C = 0;
  int64_t interval = 0;  // in tokens: keep every state before a multiple of it
};

// The arguments that prefill and decode share. Letters are those of docs/architecture.md.
struct Problem {
  int64_t B = 0;
  int64_t T = 0;  // tokens of a batch row; with cu_seqlens, of all sequences together
  int64_t N = 0;  // sequences
  int64_t H = 0, HV = 0, K = 0, V = 0;

  TokenTensor q, k, v, g, beta, o;
  const float* A_log = nullptr;    // [HV], null: exp(A_log) = 1
  const float* dt_bias = nullptr;  // [HV * K], null: 0
  IndexTensor cu_seqlens;          // [N + 1], null for a dense batch

  StateTensor initial_state, final_state;
  bool state_v_first = false;

  // Of prefill alone; decode has Pool.
  IndexTensor state_indices;  // [N]: row of initial_state; null: sequence n has row n
  bool in_place = false;      // final_state is initial_state, and written at the row that was read
  Checkpoints checkpoints;

  float scale = 1.f;
  Gate gate = Gate::kGiven;
  float lower_bound = 0.f;
  BetaMode beta_mode = BetaMode::kGiven;
  bool l2norm = false;
};

// What continuous batching adds for a few tokens a sequence (docs/architecture.md,
// recurrent_kda_pool_fwd).
struct Pool {
  IndexTensor state_indices;        // [N] or [N, T]; null: sequence n owns row n
  bool per_token = false;           // state_indices is [N, T]
  int64_t columns = 0;              // T of such state_indices
  IndexTensor num_accepted_tokens;  // [N]; null: 1
  bool in_place = false;            // final_state is the pool that initial_state reads
};

}  // namespace flashkda::cpu
