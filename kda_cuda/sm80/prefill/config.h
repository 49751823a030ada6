// Sizes of the portable prefill kernel and the layout of its shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../../common/params.h"
#include "../../common/stock.h"

namespace flashkda::cuda::sm80::prefill {

inline constexpr int kChunk = 16;
inline constexpr int kGroupWarps = 4;  // a producer
inline constexpr int kGroupThreads = 32 * kGroupWarps;
inline constexpr int kMaxSlots = 12;

// Chunks are numbered c; a helper takes every second of them.
inline constexpr int kHelpers = 2;

// VS: the value columns that one block carries the state of; V or a slice of it. Such a block makes
// its chunks itself, or kMakers_ blocks make them for all slices of a head, in turn (apart.cuh).
template <class Elem_, int K_, int VS_, int kMakers_ = 0>
struct PrefillConfig {
  using Elem = Elem_;
  static constexpr int K = K_;
  static constexpr int VS = VS_;
  static constexpr int kMakers = kMakers_;
  // From a chunk that a block makes to the next of its own, in tokens.
  static constexpr int kStep = kMakers > 1 ? kMakers * kChunk : kChunk;
  static constexpr int kChainWarps = VS / 16;  // each owns 16 value columns
  // The wider the slice, the longer a step and the fewer registers are left for producers.
  static constexpr int kProducers = VS == 128 ? 1 : 2;
  static constexpr int kLoaderWarp = kChainWarps + kHelpers + kProducers * kGroupWarps;
  // Blocks that are apart: a putter, helpers, the loader and producers, or chain warps and a taker.
  static constexpr int kThreads =
      32 * (kMakers > 0 ? 2 + kHelpers + kProducers * kGroupWarps : kLoaderWarp + 1);
  static_assert(K == 64 || K == 128, "a producer's warp owns 16 or 32 channels");
  static_assert(VS == 64 || VS == 128, "see the number of registers");
};

// A is written by eight rows of lanes at once, and read four elements at a time.
inline constexpr int kAStride = kChunk + 4;

// Where a slot keeps element i of what the chain multiplies accumulators with: what a lane needs of
// 16 elements, {0, 1, 8, 9} + 2 (lane % 4), side by side.
__host__ __device__ constexpr int paired(int i) { return (i & ~14) | (i & 6) << 1 | (i & 8) >> 2; }

// What the factors of a chunk are relative to, with G the running sum of its gates.
enum class Reference : int {
  kStart,   // k exp(G) and k exp(-G)
  kMiddle,  // k exp(G) / enter and k enter exp(-G): for steep gates
  kSplits,  // k exp(G) only, since a gate is too steep for one reference; A and M are made
            // otherwise
};

// One chunk, from its raw inputs to the factors that the chain reads, which take the inputs' place.
// Token tiles of 16-bit elements are swizzled (tile.cuh). A member that is written as one thing and
// read as another says so as "first; then".
template <class Cfg>
struct alignas(256) Slot {
  using Elem = typename Cfg::Elem;
  static constexpr int kTile = kChunk * Cfg::K;
  Elem k[kTile];  // k; then k enter / exp(G)
  Elem v[kChunk * Cfg::VS];
  float A[kChunk * kAStride];  // strictly lower, by columns
  // From here to `reference` lies what the chain reads besides v.
  Elem q[kTile];  // q; then q_bar = q exp(G) / enter
  union {
    char g[4 * kTile];  // the gate's input in its own type; then
    struct {
      Elem k_bar[kTile];    // k exp(G) / enter
      Elem k_tilde[kTile];  // k exp(G_C - G)
    };
  };
  Elem T[kChunk * kChunk];   // diag(rk) (I + A)^-1 diag(beta) but for its diagonal
  Elem M[kChunk * kChunk];   // q k^T with decay, strictly lower, before rq and rk
  Elem enter[Cfg::K];        // powers of two, paired; there for Reference::kMiddle, else 1
  float leave[Cfg::K];       // exp(G_C) / enter, paired
  float T_diagonal[kChunk];  // rk beta, paired
  float M_diagonal[kChunk];  // q k, paired
  float rk[kChunk];          // 1 / |k|, or 1
  float rq[kChunk];          // scale / |q|, or scale; paired
  Reference reference;
  float beta[kChunk];
  float norm_k[kChunk];  // 1 / |k| and 1 / |q| where they are multiplied in first
  float norm_q[kChunk];
};

struct Barriers {
  uint64_t raw[kMaxSlots];      // q, k, g, v have landed
  uint64_t tokens[kMaxSlots];   // norms, diagonals and beta are there
  uint64_t factors[kMaxSlots];  // k_bar, q_bar, k_tilde, k / exp(G) are there
  uint64_t full[kMaxSlots];     // T and M are there as well
  uint64_t empty[kMaxSlots];    // the chain has read them
  int sequence;                 // what sequence_of_rank found
  int block;                    // the block's number, of those that are apart
};

inline constexpr size_t kSlotsOffset = (sizeof(Barriers) + 255) / 256 * 256;

// In a ring of no more slots than this a chunk's loads begin too late for helpers to work ahead.
inline constexpr int kShortRing = 6;

// Blocks that are apart (apart.cuh): the slices that they walk, and how many make a head's chunks.
inline constexpr int kApartSlice = 64;
inline constexpr int kApartMakers = 2;
template <class Elem>
using ApartConfig = PrefillConfig<Elem, 128, kApartSlice, kApartMakers>;

// They hand chunks over in a ring in global memory, so short that it stays in the L2.
inline constexpr int kStock = 16;      // places of a head's ring
inline constexpr int kMaxReaders = 2;  // blocks that walk a head

// More slots than these a reader needs not, and it gives places back the later the more it has.
inline constexpr int kReaderSlots = 8;
static_assert(kReaderSlots < kStock, "a place is given back before its next chunk is waited for");

struct alignas(128) StockFlags {
  unsigned put[kStock];         // how often a chunk has been put into a place
  unsigned taken[kMaxReaders];  // chunks that a reader has read
};

// What the chain reads of a slot besides v, in whole pieces of 16 bytes.
template <class Cfg>
struct alignas(128) StockChunk {
  using S = Slot<Cfg>;
  static constexpr size_t kBegin = offsetof(S, q);
  static constexpr size_t kEnd = (offsetof(S, reference) + sizeof(Reference) + 15) / 16 * 16;
  static_assert(kBegin % 16 == 0 && kEnd <= sizeof(S));
  char bytes[kEnd - kBegin];
};

// Of all heads of a call, or of one.
template <class Cfg>
struct Stock {
  unsigned* started;  // the call's blocks that have
  StockFlags* flags;
  StockChunk<Cfg>* chunks;  // kStock a head

  __device__ __forceinline__ Stock of(int head) const {
    return {started, flags + head, chunks + head * kStock};
  }
};

template <class Cfg>
using ApartLayout = StockLayout<StockFlags, StockChunk<Cfg>, kStock>;

template <class Cfg>
int count_slots(size_t smem_limit) {
  const int fit = static_cast<int>((smem_limit - kSlotsOffset) / sizeof(Slot<Cfg>));
  return fit < kMaxSlots ? fit : kMaxSlots;
}

template <class Cfg>
size_t smem_bytes(int slots) {
  return kSlotsOffset + slots * sizeof(Slot<Cfg>);
}

}  // namespace flashkda::cuda::sm80::prefill
