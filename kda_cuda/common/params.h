// What a kernel is told: plain pointers, strides and choices, all checked before they get here.
#pragma once

#include <cstdint>

namespace flashkda::cuda {

enum class DType : int { kF32, kBF16, kF16 };
enum class Gate : int { kGiven, kSoftplus, kBounded };
enum class BetaMode : int { kGiven, kSigmoid, kTwiceSigmoid };

// A [B, T, heads, D] tensor with unit stride in D. Strides count elements.
struct TokenTensor {
  void* ptr = nullptr;
  DType dtype = DType::kBF16;
  int64_t stride_b = 0;
  int64_t stride_t = 0;
  int64_t stride_h = 0;
};

// A [N or P, HV, K, V] tensor (or [.., V, K]), contiguous but for its first dimension; ptr is null
// where absent.
struct StateTensor {
  void* ptr = nullptr;
  DType dtype = DType::kF32;
  int64_t stride_n = 0;
  int64_t size = 0;  // extent of the first dimension
};

// An [N] or [N, C] tensor of int32 or int64; ptr is null where absent. Strides count elements.
struct IndexTensor {
  const void* ptr = nullptr;
  bool is_64 = false;
  int64_t stride_n = 0;
  int64_t stride_c = 0;
};

// States inside a sequence that prefill keeps (docs/architecture.md, chunk_kda_fwd); states.cuh
// says which and where. Either `offsets` or `interval` is given.
struct Checkpoints {
  StateTensor states;   // [rows, HV, K, V]; null: none are kept. Here fp16 is a dtype as well
  IndexTensor offsets;  // [N, C]: how many tokens of the sequence come before the checkpoint
  IndexTensor indices;  // [N, C]: its row of states; null: n * C + c
  int C = 0;
  int interval = 0;  // in tokens: keep every state before a multiple of it, sequence by sequence
};

// The arguments that prefill and decode share. Letters are those of docs/architecture.md.
struct Problem {
  int64_t B = 0;
  int64_t T = 0;  // tokens of a batch row; with cu_seqlens, of all sequences together
  int64_t N = 0;  // sequences
  int H = 0, HV = 0, K = 0, V = 0;

  TokenTensor q, k, v, g, beta,
      o;  // beta is [B, T, HV]: its stride_h is the stride of the last dimension
  const float* A_log = nullptr;      // [HV], null: exp(A_log) = 1
  const float* dt_bias = nullptr;    // [HV * K], null: 0
  const void* cu_seqlens = nullptr;  // [N + 1], null for a dense batch
  bool cu_seqlens_64 = false;

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
  const void* state_indices = nullptr;  // [N] or [N, T]; null: sequence n owns row n
  bool state_indices_64 = false;
  int64_t stride_n = 0;
  int64_t stride_t = 0;
  bool per_token = false;  // state_indices is [N, T]: every token's state is kept
  int64_t width = 0;       // T of state_indices [N, T]; later tokens have no row
  const void* num_accepted_tokens = nullptr;  // [N], null: 1
  bool num_accepted_tokens_64 = false;
  bool in_place = false;  // final_state is the pool that initial_state reads
};

inline constexpr int kMaxDevices = 64;

// The device of a launch.
struct Target {
  int device = 0;      // below kMaxDevices
  int capability = 0;  // major * 10 + minor
  int multiprocessors = 0;
  int smem_limit = 0;  // opt-in shared memory of a block in bytes
};

}  // namespace flashkda::cuda
