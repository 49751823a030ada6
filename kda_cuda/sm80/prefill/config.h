// Sizes of the portable prefill kernel and the layout of its shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../common/params.h"

namespace flashkda::cuda::sm80::prefill {

inline constexpr int kChunk = 16;
inline constexpr int kGroupWarps = 4;  // a producer
inline constexpr int kGroupThreads = 32 * kGroupWarps;
inline constexpr int kMaxSlots = 12;

// VS: the value columns that one block carries the state of; V or a slice of it.
template <class Elem_, int K_, int VS_>
struct PrefillConfig {
  using Elem = Elem_;
  static constexpr int K = K_;
  static constexpr int VS = VS_;
  static constexpr int kChainWarps = VS / 16;  // each owns 16 value columns
  // Three keep up with slices of 64 columns. Otherwise two: up to 12 warps may have 168 registers.
  static constexpr int kProducers = VS == 64 ? 3 : 2;
  // Where registers permit, two warps take the producers' triangles and what comes from q, k and
  // beta alone; elsewhere they do it.
  static constexpr int kHelpers = VS == 32 ? 2 : 0;
  static constexpr int kThreads = 32 * (kChainWarps + kHelpers) + kProducers * kGroupThreads;
  static_assert(K == 64 || K == 128, "a producer's warp owns 16 or 32 channels");
  static_assert(VS == 32 || VS == 64 || VS == 128, "see the number of registers");
};

// A is written by eight rows of lanes at once.
inline constexpr int kAStride = kChunk + 4;

// One chunk, from its raw inputs to the factors that the chain reads, which take the inputs' place.
// Token tiles are swizzled (tile.cuh), g is not. A member that is written as one thing and read as
// another says so as "first; then".
template <class Cfg>
struct alignas(128) Slot {
  using Elem = typename Cfg::Elem;
  static constexpr int kTile = kChunk * Cfg::K;
  Elem k[kTile];  // k; then k / exp(G)
  Elem q[kTile];  // q; then q_bar = q exp(G)
  union {
    char g[4 * kTile];  // the gate's input in its own type; then
    struct {
      Elem k_bar[kTile];    // k exp(G)
      Elem k_tilde[kTile];  // k exp(G_C - G)
    };
  };
  Elem v[kChunk * Cfg::VS];    // v; then o
  Elem T[kChunk * kChunk];     // diag(rk) (I + A)^-1 diag(beta) but for its diagonal
  Elem M[kChunk * kChunk];     // q k^T with decay, strictly lower, before rq and rk
  float A[kChunk * kAStride];  // strictly lower, by columns
  float decay[Cfg::K];         // exp(G_C)
  float beta[kChunk];
  float T_diagonal[kChunk];  // rk beta
  float M_diagonal[kChunk];  // q k
  float norm_k[kChunk];      // 1 / |k| and 1 / |q| where they are multiplied in first
  float norm_q[kChunk];
  float rk[kChunk];  // 1 / |k|, or 1
  float rq[kChunk];  // scale / |q|, or scale
};

struct Barriers {
  uint64_t raw[kMaxSlots];       // q, k, g, v have landed
  uint64_t tokens[kMaxSlots];    // norms, diagonals and beta are there
  uint64_t triangle[kMaxSlots];  // A, beta and rk are there
  uint64_t full[kMaxSlots];      // the factors are there
  uint64_t empty[kMaxSlots];     // the chain has read them
  int sequence;                  // what sequence_of_rank found
};

inline constexpr size_t kSlotsOffset = (sizeof(Barriers) + 127) / 128 * 128;

// How the shared memory of a device is spent.
struct Ring {
  int slots;
  int producers;
  int ahead;  // how many chunks before its turn a chunk is loaded
};

template <class Cfg>
Ring make_ring(size_t smem_limit) {
  const int fit = static_cast<int>((smem_limit - kSlotsOffset) / sizeof(Slot<Cfg>));
  Ring ring;
  ring.slots = fit < kMaxSlots ? fit : kMaxSlots;
  ring.producers = ring.slots - 2 < Cfg::kProducers ? ring.slots - 2 : Cfg::kProducers;
  // When a producer begins a chunk, the chain has read all but those that the producers just made
  // or are making, and where there is room, two more.
  const int room = ring.slots - ring.producers - 1;
  ring.ahead = room > 4 ? room - 2 : room;
  return ring;
}

template <class Cfg>
size_t smem_bytes(const Ring& ring) {
  return kSlotsOffset + ring.slots * sizeof(Slot<Cfg>);
}

}  // namespace flashkda::cuda::sm80::prefill
