// The layout of a block's shared memory.
#pragma once

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../../common/decay.cuh"
#include "../../common/states.cuh"
#include "../../common/work.cuh"
#include "config.h"
#include "steep.cuh"
#include "triangle.cuh"

namespace flashkda::cuda::sm90::prefill {

static_assert(kPart == kTriangle);

// What chunks arrive as. Where the decay is steep, the factor warps write other factors over it
// (factors.cuh).
struct alignas(1024) Raw {
  __nv_bfloat16 k[2][kChunk][kHalf];
  __nv_bfloat16 q[2][kChunk][kHalf];
  char g[4 * kChunk * kChannels];  // fp32 in quarters of 32 channels; 16-bit types like k
};

inline constexpr int kQuarter = kChannels / 4;  // the channels of a factor warp

inline constexpr int kDecayStride = kChannels / 4 + 4;  // four lanes read 16 bytes each at once

// What the square warps make of a part.
struct Squares {
  __nv_bfloat16 T[kPart * kPart];  // diag(rk) (I + A)^-1 diag(beta) but for its diagonal
  __nv_bfloat16 M[kPart * kPart];  // q k^T with decay, strictly lower, before rq and rk
  // Of the late part's tokens with the early part's: of the early part, q k^T; of the late, k k^T.
  __nv_bfloat16 cross[kPart * kPart];
  float rk[kPart];          // 1 / |k|, or 1; this and the next by token_place
  float rq[kPart];          // scale / |q|, or scale
  float T_diagonal[kPart];  // rk beta
  float M_diagonal[kPart];  // q k
};

// A chunk as the chain reads it. The factors are about the chunk's middle m: 0 <= G_m - G_t after
// it, and the other way around before it.
struct alignas(1024) Slot {
  __nv_bfloat16 left[2][2 * kChunk][kHalf];  // k exp(G - G_m), and below it q exp(G - G_m)
  __nv_bfloat16 right[2][kChunk][kHalf];     // k exp(G_m - G)
  float enter[kDecayStride * 4];  // the decay from the chunk's start to its middle, by decay_place
  float leave[kDecayStride * 4];  // from the middle to the chunk's end
  Squares squares[2];
};

inline constexpr uint32_t kSlotBytes = offsetof(Slot, squares) + sizeof(Slot::squares);

// A chunk's v, of each chain warpgroup.
template <class Cfg>
struct alignas(1024) Values {
  __nv_bfloat16 v[Cfg::kChainGroups][kChunk][kHalf];
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
  union {
    float A[kPart * kTriangleStride];  // strictly lower, by columns
    Near near[4];                      // before A: of the quarters, from the factor warps
  };
  float beta[kPart], rk[kPart];
};

// How the square warps get at the products of a part's tokens with each other.
enum Decay : int {
  kUsual,  // from the slot's factors
  kSteep,  // by what the factor warps write over q, k and g, and by sums of their own (steep.cuh)
};

// A ring in global memory for the chunks of a head, so long that its latencies do not show: a copy
// there, a flag, and a copy from there.
inline constexpr int kStock = 16;

struct alignas(128) StockFlags {
  unsigned put[kStock];  // how often a square warp has put its part of a chunk into a place
  uint2 taken;           // chunks that either reader has read
};

// What the blocks of a team that are apart share; of a call, the first team's.
struct Stock {
  unsigned* started;  // the call's blocks that have
  StockFlags* flags;
  Slot* chunks;  // kStock a team
};

// What a chain finds ahead of its sequence's checkpoints, lest it wait for global memory where it
// keeps a state: of each, one a lane; or of those at an interval, in the first, the sequence's
// first row.
struct ListedCheckpoint {
  int64_t row;
  int unit;
};
inline constexpr int kListed = 32;

// What the factor warps need of a head's gate. Kept here, because registers are scarce, and because
// a maker's head may change with every chunk.
struct HeadGate {
  float4 shift[kChannels / 4];
  DecayParams params;
};

// Where a head's sequence begins, as the copy engine counts.
struct alignas(16) Origin {
  int begin, row, h, hv;
  int half;  // the block's first value columns
};

// Of a block that makes chunks and walks a chain.
template <class Cfg>
struct WholeRings {
  Slot slots[Cfg::kSlots];
  Raw raw[Cfg::kHeld];
  Values<Cfg> values[Cfg::kSlots];
};

// Of a block that does either: who makes chunks needs room for its own only.
template <class Cfg>
struct PartedRings {
  union {
    struct {
      Slot slots[Cfg::kSlots];
      Values<Cfg> values[Cfg::kSlots];
    };
    struct {
      Slot own_slots[Cfg::kOwn];
      Raw raw[Cfg::kHeld];
    };
  };
};

// Of a chain block that makes few, which has the raw inputs of one chunk; and of who helps it,
// which has no v, and room for more raw inputs and for its own slots, the last ones.
template <class Cfg>
struct HelpedRings {
  union {
    struct {
      Raw few_raw[1];  // an array: some compilers take nothing else here
      Values<Cfg> values[Cfg::kSlots];
      Slot slots[Cfg::kSlots];
    };
    Raw raw[Cfg::kHeld];
  };
  static_assert(sizeof(raw) <=
                sizeof(few_raw) + sizeof(values) + (Cfg::kSlots - Cfg::kOwn) * sizeof(Slot));
};

template <class Cfg>
using Rings =
    std::conditional_t<Cfg::kMakersOnly, PartedRings<Cfg>,
                       std::conditional_t<Cfg::kHelped, HelpedRings<Cfg>, WholeRings<Cfg>>>;

template <class Cfg>
struct Shared : Rings<Cfg> {
  Scratch scratch[kSquareWarps];
  union {
    alignas(256)
        __nv_bfloat16 o[4 * Cfg::kChainGroups][2][kPart * kPart];  // a chain warp's, on its way out
    HeadGate gates[Cfg::kHeads];  // of a block without a chain that makes chunks for several heads
  };
  HeadGate gate;                            // of any other
  alignas(16) int decay[Cfg::kUses][2][4];  // a Decay for each quarter of a part
  // The square warps empty it for the factor warps too: they wait for their factors first.
  uint64_t raw_full[Cfg::kUses], raw_empty[Cfg::kUses];
  uint64_t norms[Cfg::kUses][2];  // by parts: the square warp has read the part's q and k
  uint64_t factors_full[Cfg::kUses];
  uint64_t full[Cfg::kSlots];     // the chunk is there, and its v
  uint64_t empty[Cfg::kEmptied];  // all the slot's readers have read it
  uint64_t values_empty[Cfg::kSlots];
  Work work;  // kept here, because registers are scarce
  Origin origins[Cfg::kHeads];
  ListedCheckpoint checkpoints[kListed];
  int wrong_checkpoints;
  int stops[4 * Cfg::kChainGroups];  // of each chain warp, its next checkpoint
  int sequence;                      // what sequence_of_rank found
  Stock stock;                       // of a team that is apart
  int block;                         // its number there
};

// A place in a ring and the parity of its current use.
struct Cursor {
  int size;
  int at = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit Cursor(int size) : size(size) {}

  __device__ __forceinline__ void advance(int by) {
    at += by;
    if (at >= size) {
      at -= size;
      parity ^= 1;
    }
  }

  __device__ __forceinline__ Cursor before() const {
    Cursor x = *this;
    x.at = at == 0 ? size - 1 : at - 1;
    x.parity ^= at == 0;
    return x;
  }
};

}  // namespace flashkda::cuda::sm90::prefill
