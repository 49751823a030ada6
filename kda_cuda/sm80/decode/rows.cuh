// Which rows of states a sequence reads and writes. Nothing has checked the indices, which lie on
// the device: what is out of range must not be followed.
#pragma once

#include "../../common/convert.cuh"
#include "params.h"

namespace flashkda::cuda::sm80::decode {

constexpr int64_t kNoRow = -1;

struct Rows {
  int64_t source;  // row of the state to start from, kNoRow: zero
  int64_t target;  // row that takes the state after the last token, kNoRow: none
  // No index is out of range. Else the output is NaN and no row of a pool is touched.
  bool valid;
};

__device__ __forceinline__ int64_t slot_of(const Params& p, int64_t n, int64_t t) {
  return load_index<false>(p.state_indices, n * p.indices_stride_n + t * p.indices_stride_t,
                           p.state_indices_64);
}

__device__ __forceinline__ bool slot_valid(int64_t slot, const States& states) {
  return slot >= kNoRow && slot < states.size;
}

__device__ __forceinline__ bool keeps_every_state(const Params& p) {
  return p.in_place && p.per_token;
}

// Of a sequence of one token, without an index for each.
__device__ __forceinline__ Rows find_row(const Params& p, uint32_t n) {
  Rows rows{n, n, true};
  if (p.state_indices != nullptr) {
    rows.source = slot_of(p, n, 0);
    rows.valid = slot_valid(rows.source, p.initial_state);
    if (p.in_place) rows.target = rows.valid ? rows.source : kNoRow;
  }
  if (p.initial_state.ptr == nullptr) rows.source = kNoRow;
  if (p.final_state.ptr == nullptr) rows.target = kNoRow;
  return rows;
}

// Of a sequence of `length` tokens. All lanes of a warp must call it.
__device__ __forceinline__ Rows find_rows(const Params& p, uint32_t n, int length) {
  Rows rows{n, n, true};
  if (p.state_indices != nullptr) {
    int64_t t = 0;
    if (p.per_token) {
      if (p.num_accepted_tokens != nullptr) {
        t = load_index<false>(p.num_accepted_tokens, n, p.accepted_64) - 1;
      }
      rows.valid = t >= 0 && t < p.indices_width;
    }
    rows.source = rows.valid ? slot_of(p, n, t) : kNoRow;
    rows.valid = rows.valid && slot_valid(rows.source, p.initial_state);
    if (keeps_every_state(p)) {
      bool valid = true;
      for (int i = threadIdx.x % 32; i < length && i < p.indices_width; i += 32) {
        valid = valid && slot_valid(slot_of(p, n, i), p.final_state);
      }
      rows.valid = __all_sync(~0u, valid) && rows.valid;
    }
    if (p.in_place) rows.target = rows.source;
  }
  if (p.initial_state.ptr == nullptr) rows.source = kNoRow;
  if (p.final_state.ptr == nullptr || keeps_every_state(p)) rows.target = kNoRow;
  if (p.in_place && (!rows.valid || length == 0)) rows.target = kNoRow;
  return rows;
}

}  // namespace flashkda::cuda::sm80::decode
