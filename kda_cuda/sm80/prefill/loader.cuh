// Brings chunks into the ring with cp.async: each warp of a producer loads one of k, q, v and g.
#pragma once

#include <type_traits>

#include "../../common/ptx.cuh"
#include "../../common/tile.cuh"
#include "work.cuh"

namespace flashkda::cuda::sm80::prefill {

template <class Cfg>
class Loader {
  static constexpr int K = Cfg::K;

 public:
  __device__ Loader(const Problem& p, const Work& w, int warp, int lane)
      : w_(w), lane_(lane), warp_(warp), wide_gate_(p.g.dtype == DType::kF32) {
    if (warp == 0) {
      from_ = source<2 * K>(p.k, w.h, 0);
    } else if (warp == 1) {
      from_ = source<2 * K>(p.q, w.h, 0);
    } else if (warp == 2) {
      from_ = source<2 * Cfg::VS>(p.v, w.hv, w.v0);
    } else {
      from_ = wide_gate_ ? source<4 * K>(p.g, w.hv, 0) : source<2 * K>(p.g, w.hv, 0);
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
  // Where a lane's pieces of a tensor's tiles begin. A warp loads 32 consecutive pieces of 16 bytes at once.
  struct Source {
    const char* piece;  // the lane's first piece of the sequence's first tile
    const char* row;    // the tile's first row
    int64_t stride;     // bytes from token to token
    bool aligned;       // every piece begins at a multiple of its size
  };

  template <int RowBytes>
  __device__ __forceinline__ Source source(const TokenTensor& x, int head, int column) const {
    constexpr int kPieces = RowBytes / kPiece;
    const int bytes = x.dtype == DType::kF32 ? 4 : 2;
    Source from;
    from.row = static_cast<const char*>(x.ptr) + (w_.row * x.stride_b + w_.begin * x.stride_t +
                                                  head * x.stride_h + column) *
                                                     bytes;
    from.stride = x.stride_t * bytes;
    from.piece = from.row + lane_ / kPieces * from.stride + lane_ % kPieces * kPiece;
    from.aligned =
        (reinterpret_cast<uintptr_t>(from.row) | static_cast<uintptr_t>(from.stride)) % kPiece == 0;
    return from;
  }

  // Rows past the sequence's end become zeros.
  template <int ElementBytes, int RowBytes, bool Swizzled>
  __device__ __forceinline__ void load_tile(char* tile, int chunk) const {
    const Source& from = from_;
    constexpr int kPieces = RowBytes / kPiece;
    constexpr int kRows = 32 / kPieces;  // that a warp loads at once
    const int rows =
        static_cast<int>(min(w_.tokens - int64_t{chunk} * kChunk, int64_t{kChunk}));
    const int64_t begin = int64_t{chunk} * kChunk * from.stride;
    if (from.aligned) {
      // Every t is a multiple of kRows, a power of two, so that swizzle(row + t) is row ^ swizzle(t).
      const int row = lane_ / kPieces;
      const int piece = lane_ % kPieces ^ (Swizzled ? row : 0);
      const char* x = from.piece + begin;
      char* to = tile + row * RowBytes;
      if (rows == kChunk) {
#pragma unroll
        for (int t = 0; t < kChunk; t += kRows) {
          ptx::cp_async_16(to + t * RowBytes + (piece ^ (Swizzled ? swizzle(t) : 0)) * kPiece, x, true);
          x += kRows * from.stride;
        }
      } else {
#pragma unroll 1
        for (int t = 0; t < kChunk; t += kRows) {
          const bool keep = row + t < rows;
          ptx::cp_async_16(to + t * RowBytes + (piece ^ (Swizzled ? swizzle(t) : 0)) * kPiece,
                           keep ? x : from.row, keep);
          x += kRows * from.stride;
        }
      }
    } else {
      using Bits = std::conditional_t<ElementBytes == 2, uint16_t, uint32_t>;
      constexpr int kColumns = RowBytes / ElementBytes;
#pragma unroll 1
      for (int i = lane_; i < kChunk * kColumns; i += 32) {
        const int t = i / kColumns, column = i % kColumns;
        const int at = column * ElementBytes / kPiece;
        char* to = tile + t * RowBytes + (Swizzled ? at ^ swizzle(t) : at) * kPiece +
                   column * ElementBytes % kPiece;
        const Bits* x = reinterpret_cast<const Bits*>(from.row + begin + t * from.stride) + column;
        *reinterpret_cast<Bits*>(to) = t < rows ? *x : Bits{0};
      }
    }
  }

  const Work& w_;
  int lane_, warp_;
  bool wide_gate_;
  Source from_;
};

}  // namespace flashkda::cuda::sm80::prefill
