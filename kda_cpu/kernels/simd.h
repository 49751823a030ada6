// Vectors of kLanes floats, in the vector extension that gcc and clang share: no intrinsics, every
// architecture.
#pragma once

#include "prelude.h"

#define FLASHKDA_INLINE inline __attribute__((always_inline))

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

constexpr int kLanes = FLASHKDA_CPU_LANES;

// A register tile of a matrix product has kTileRows rows of kTileVecs vectors. Rows are broadcast,
// so a step of the product loads kTileVecs vectors and kTileRows scalars for kTileRows * kTileVecs
// multiply-adds.
constexpr int kTileRows = 4;
constexpr int kTileVecs = FLASHKDA_CPU_TILE_VECS;
constexpr int kTileCols = kTileVecs * kLanes;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
FLASHKDA_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

FLASHKDA_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

FLASHKDA_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

FLASHKDA_INLINE Vec broadcast(float x) { return x - Vec{}; }

// Lane l of the result: a[l] + a[l + kStep] where l / kStep is even, b[l - kStep] + b[l] where it
// is odd.
template <int kStep, int... kLane>
FLASHKDA_INLINE Vec add_neighbours(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...) +
         __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
}

template <int kStep, int... kLane>
FLASHKDA_INLINE Vec rotate(Vec a, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, a, ((kLane + kStep) % kLanes)...);
}

// The sums of the lanes of four vectors, in lanes 0 to 3.
FLASHKDA_INLINE Vec sum_lanes(Vec a, Vec b, Vec c, Vec d) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  Vec sums = add_neighbours<2>(add_neighbours<1>(a, b, Lanes{}), add_neighbours<1>(c, d, Lanes{}),
                               Lanes{});
  if constexpr (kLanes >= 16) sums += rotate<8>(sums, Lanes{});
  if constexpr (kLanes >= 8) sums += rotate<4>(sums, Lanes{});
  return sums;
}

constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
