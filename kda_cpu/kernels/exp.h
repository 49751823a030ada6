// The exponential and log(1 + y) on vectors, each within about one unit in the last place.
#pragma once

#include "simd.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

// exp(x) = 2^n exp(f) with n = round(x / ln 2), |f| <= ln(2) / 2. Below ln(FLT_MIN) the result is
// 0, above 88 it is exp(88); NaN stays NaN. The polynomial is the minimax fit of (exp(f) - 1 - f) /
// f^2, off by 3.1e-9 in exp(f).
FLASHKDA_INLINE Vec exp(Vec x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves round(x) in the low bits of the sum
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  const Vec high = broadcast(88.f);
  x = x > high ? high : x;
  const Vec shifted = x * 0x1.715476p0f + kRound;
  const Vec n = shifted - kRound;
  const Vec f = (x - n * kLn2High) - n * kLn2Low;
  Vec p = broadcast(0.0013950481079518795f);
  p = p * f + 0.008368883281946182f;
  p = p * f + 0.04166620597243309f;
  p = p * f + 0.166665181517601f;
  p = p * f + 0.5f;
  p = p * (f * f) + f;
  p = p + 1.f;
  const Vec power = bit_cast<Vec>((bit_cast<BitVec>(shifted) + 127u) << 23);
  const Vec zero = {};
  return x < -87.3365f ? zero : p * power;
}

// log(1 + y) for 0 <= y <= 1, as 2 atanh(s) with s = y / (2 + y): relative accuracy down to the
// smallest y.
FLASHKDA_INLINE Vec log1p(Vec y) {
  const Vec s = y / (y + 2.f);
  const Vec z = s * s;
  Vec p = broadcast(0.12150470167398453f);
  p = p * z + 0.10713828355073929f;
  p = p * z + 0.14308442175388336f;
  p = p * z + 0.19999438524246216f;
  p = p * z + 0.3333333730697632f;
  p = p * z;
  return 2.f * (s + s * p);
}

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
