// Brings chunks into the ring with cp.async: each warp of a producer loads one of k, q, v and g.
#pragma once

#include <type_traits>

#include "../../common/ptx.cuh"
#include "../../common/tile.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

// A tile whose rows are not aligned for cp.async. Not inlined: its addresses would be found ahead
// and spilled around the path that most chunks take.
template <int ElementBytes, int RowBytes, bool Swizzled>
__device__ __noinline__ void load_elements(char* tile, const char* x, int64_t stride, int rows,
                                           int lane) {
  using Bits = std::conditional_t<ElementBytes == 2, uint16_t, uint32_t>;
  constexpr int kColumns = RowBytes / ElementBytes;
#pragma unroll 1
  for (int i = lane; i < kChunk * kColumns; i += 32) {
    const int t = i / kColumns, column = i % kColumns;
    const int at = column * ElementBytes / kPiece;
    char* to = tile + t * RowBytes + (Swizzled ? at ^ swizzle<RowBytes / 2>(t) : at) * kPiece +
               column * ElementBytes % kPiece;
    const Bits* from = reinterpret_cast<const Bits*>(x + t * stride) + column;
    *reinterpret_cast<Bits*>(to) = t < rows ? *from : Bits{0};
  }
}

template <class Cfg>
class Loader {
  static constexpr int K = Cfg::K;

 public:
  __device__ Loader(const Problem& p, const Work& w, int warp, int lane)
      : w_(w), lane_(lane), warp_(warp), wide_gate_(p.g.dtype == DType::kF32) {
    if (warp == 0) {
      point_at<2 * K>(p.k, w.h, 0);
    } else if (warp == 1) {
      point_at<2 * K>(p.q, w.h, 0);
    } else if (warp == 2) {
      point_at<2 * Cfg::VS>(p.v, w.hv, w.v0);
    } else if (wide_gate_) {
      point_at<4 * K>(p.g, w.hv, 0);
    } else {
      point_at<2 * K>(p.g, w.hv, 0);
    }
  }

  __device__ __forceinline__ void load(Slot<Cfg>* slot, int chunk, uint64_t* landed) const {
    if (warp_ < 2) {
      load_tile<2, 2 * K, true>(reinterpret_cast<char*>(warp_ == 0 ? slot->k : slot->q), chunk);
    } else if (warp_ == 2) {
      load_tile<2, 2 * Cfg::VS, true>(reinterpret_cast<char*>(slot->v), chunk);
    } else if (wide_gate_) {
      load_tile<4, 4 * K, false>(slot->g, chunk);
    } else {
      load_tile<2, 2 * K, false>(slot->g, chunk);
    }
    ptx::cp_async_arrive(landed);
    ptx::mbarrier_arrive(landed);
  }

 private:
  // Points piece_ and stride_ at a tensor. A warp loads 32 consecutive pieces of 16 bytes at once.
  template <int RowBytes>
  __device__ __forceinline__ void point_at(const TokenTensor& x, int head, int column) {
    constexpr int kPieces = RowBytes / kPiece;
    const int bytes = x.dtype == DType::kF32 ? 4 : 2;
    stride_ = x.stride_t * bytes;
    piece_ = static_cast<const char*>(x.ptr) +
             (w_.row * x.stride_b + w_.begin * x.stride_t + head * x.stride_h + column) * bytes +
             lane_ / kPieces * stride_ + lane_ % kPieces * kPiece;
  }

  // Rows past the sequence's end become zeros.
  template <int ElementBytes, int RowBytes, bool Swizzled>
  __device__ __forceinline__ void load_tile(char* tile, int chunk) const {
    constexpr int kPieces = RowBytes / kPiece;
    constexpr int kRows = 32 / kPieces;  // that a warp loads at once
    const int rows = static_cast<int>(min(w_.tokens - int64_t{chunk} * kChunk, int64_t{kChunk}));
    // Places and multiples of the stride are cheaper to find again than to keep, and spill.
    const int lane = ptx::opaque_lane(lane_);
    const int64_t stride = ptx::opaque(stride_);
    const int row = lane / kPieces;
    const char* x = piece_ + int64_t{chunk} * kChunk * stride;
    if ((reinterpret_cast<uintptr_t>(x) | static_cast<uintptr_t>(stride)) % kPiece == 0) {
      // Every t is a multiple of kRows, a power of two, so that swizzle(row + t) is row ^
      // swizzle(t).
      const int piece = lane % kPieces ^ (Swizzled ? swizzle<RowBytes / 2>(row) : 0);
      char* to = tile + row * RowBytes;
      if (rows == kChunk) {
#pragma unroll
        for (int t = 0; t < kChunk; t += kRows) {
          ptx::cp_async_16(
              to + t * RowBytes + (piece ^ (Swizzled ? swizzle<RowBytes / 2>(t) : 0)) * kPiece, x,
              true);
          x += kRows * stride;
        }
      } else {
#pragma unroll 1
        for (int t = 0; t < kChunk; t += kRows) {
          const bool keep = row + t < rows;
          ptx::cp_async_16(
              to + t * RowBytes + (piece ^ (Swizzled ? swizzle<RowBytes / 2>(t) : 0)) * kPiece,
              keep ? x : piece_, keep);
          x += kRows * stride;
        }
      }
    } else {
      load_elements<ElementBytes, RowBytes, Swizzled>(
          tile, x - row * stride - lane % kPieces * kPiece, stride, rows, lane);
    }
  }

  const Work& w_;
  int lane_, warp_;
  bool wide_gate_;
  const char* piece_;  // the lane's first piece of the sequence's first chunk
  int64_t stride_;     // bytes from token to token
};

}  // namespace flashkda::cuda::sm80::prefill
