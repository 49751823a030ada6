// The layout of a block's shared memory.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#include "../../common/triangle.cuh"
#include "../../common/work.cuh"
#include "config.h"

namespace flashkda::cuda::sm90::prefill {

static_assert(kChunk == kWorkChunk && kChunk == kTriangle);

// What chunks arrive as.
struct alignas(1024) Raw {
  __nv_bfloat16 k[2][kChunk][kHalf];
  __nv_bfloat16 q[2][kChunk][kHalf];
  char g[4 * kChunk * kChannels];  // fp32 in rows of 128 channels; 16-bit types like k
};

inline constexpr int kDecayStride = kChannels / 4 + 4;  // four lanes read 16 bytes each at once

// A chunk as the chain reads it: what the factor warps make, and what the square warps do.
struct alignas(1024) Slot {
  __nv_bfloat16 bars[2][2 * kChunk][kHalf];  // k exp(G), and below it q exp(G)
  __nv_bfloat16 k_tilde[2][kChunk][kHalf];   // k exp(G_C - G)
  float decay[kDecayStride * 4];             // exp(G_C), by decay_place

  __nv_bfloat16 T[kChunk * kChunk];  // diag(rk) (I + A)^-1 diag(beta) but for its diagonal
  __nv_bfloat16 M[kChunk * kChunk];  // q k^T with decay, strictly lower, before rq and rk
  float rk[kChunk];                  // 1 / |k|, or 1; this and the next by token_place
  float rq[kChunk];                  // scale / |q|, or scale
  float T_diagonal[kChunk];          // rk beta
  float M_diagonal[kChunk];          // q k
};
inline constexpr int kSlotBytes = offsetof(Slot, M_diagonal) + sizeof(Slot::M_diagonal);

// What the square warps need of the factor warps besides.
struct alignas(1024) Hat {
  __nv_bfloat16 k_hat[2][kChunk][kHalf];  // k exp(-G), unless the chunk is steep
};

struct alignas(1024) Values {
  __nv_bfloat16 v[kChunk][kHalf];
};

// A lane of the chain has channels 8 n + 2 (lane % 4) + {0, 1}, all n, and tokens 8 h + 2 (lane %
// 4) + {0, 1}, both h: what it needs of them lies together.
__host__ __device__ constexpr int decay_place(int channel) {
  return channel % 8 / 2 * kDecayStride + channel / 8 * 2 + channel % 2;
}
__host__ __device__ constexpr int token_place(int token) {
  return token % 8 / 2 * 4 + token / 8 * 2 + token % 2;
}

// A square warp's own.
struct alignas(16) Scratch {
  float A[kChunk * kTriangleStride];  // strictly lower, by columns
  float beta[kChunk], rk[kChunk];
};

template <class Cfg>
struct Shared {
  Slot slots[Cfg::kSlots];
  Hat hats[Cfg::kOwn];
  Raw raw[kRaw];
  Values values[Cfg::kSlots][Cfg::kChainGroups];
  Scratch scratch[kSquareWarps];
  __nv_bfloat16 o[4 * Cfg::kChainGroups][kChunk * kChunk];  // a chain warp's, on its way out
  alignas(
      16) int steep[Cfg::kOwn][4];  // whether a channel of this quarter decays too far for k_hat
  uint64_t raw_full[kRaw], raw_empty[kRaw];
  uint64_t factors_full[Cfg::kOwn];
  uint64_t full[Cfg::kSlots];
  uint64_t empty[Cfg::kOwn];  // all the cluster's chains have read the slot
  uint64_t values_full[Cfg::kSlots], values_empty[Cfg::kSlots];
  int sequence;  // what sequence_of_rank found
};

// The address of a part of the block's shared memory, from that of the whole.
template <class Cfg>
__device__ __forceinline__ uint32_t address_of(const Shared<Cfg>& s, uint32_t base,
                                               const void* part) {
  return base +
         static_cast<uint32_t>(static_cast<const char*>(part) - reinterpret_cast<const char*>(&s));
}

// A place in a ring of N and the parity of its current use.
template <int N>
struct Cursor {
  int at;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit Cursor(int first) : at(first) {}

  __device__ __forceinline__ void advance(int by) {
    at += by;
    if (at >= N) {
      at -= N;
      parity ^= 1;
    }
  }
};

}  // namespace flashkda::cuda::sm90::prefill
