// Brings chunks into the ring with cp.async: one warp loads k, q, v and g.
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
  constexpr int kBatch = 8;  // loads on their way at a time
#pragma unroll 1
  for (int i = lane; i < kChunk * kColumns; i += 32 * kBatch) {
    Bits y[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int t = (i + 32 * j) / kColumns, column = (i + 32 * j) % kColumns;
      y[j] = t < rows ? *(reinterpret_cast<const Bits*>(x + t * stride) + column) : Bits{0};
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int t = (i + 32 * j) / kColumns, column = (i + 32 * j) % kColumns;
      const int at = column * ElementBytes / kPiece;
      char* to = tile + t * RowBytes + (Swizzled ? at ^ swizzle<RowBytes / 2>(t) : at) * kPiece +
                 column * ElementBytes % kPiece;
      *reinterpret_cast<Bits*>(to) = y[j];
    }
  }
}

// A lane's part of one tensor's tiles, which begin kStep tokens after each other; a warp loads 32
// consecutive pieces of 16 bytes at once.
template <int ElementBytes, int Columns, bool Swizzled, int kStep>
class TileLoader {
  static constexpr int kRowBytes = ElementBytes * Columns;
  static constexpr int kPieces = kRowBytes / kPiece;
  static constexpr int kRows = 32 / kPieces;  // that a warp loads at once

 public:
  __device__ __forceinline__ TileLoader(const TokenTensor& x, const Work& w, int head, int column,
                                        int lane)
      : stride_(x.stride_t * ElementBytes) {
    piece_ =
        static_cast<const char*>(x.ptr) +
        (w.row * x.stride_b + w.begin * x.stride_t + head * x.stride_h + column) * ElementBytes +
        lane / kPieces * stride_ + lane % kPieces * kPiece;
  }

  // The sequence's next chunk, of which `rows` tokens are in it: the rest become zeros.
  __device__ __forceinline__ void load(void* to_tile, int rows, int lane) {
    // Multiples of the stride are cheaper to find again than to keep, and spill.
    const int64_t stride = ptx::opaque(stride_);
    char* tile = static_cast<char*>(to_tile);
    const int row = lane / kPieces;
    const char* x = piece_;
    if ((reinterpret_cast<uintptr_t>(x) | static_cast<uintptr_t>(stride)) % kPiece == 0) {
      // Every t is a multiple of kRows, a power of two, so that swizzle(row + t) is row ^
      // swizzle(t).
      const int piece = lane % kPieces ^ (Swizzled ? swizzle<kRowBytes / 2>(row) : 0);
      char* to = tile + row * kRowBytes;
      if (rows >= kChunk) {
#pragma unroll
        for (int t = 0; t < kChunk; t += kRows) {
          ptx::cp_async_16(
              to + t * kRowBytes + (piece ^ (Swizzled ? swizzle<kRowBytes / 2>(t) : 0)) * kPiece, x,
              true);
          x += kRows * stride;
        }
      } else {
#pragma unroll 1
        for (int t = 0; t < kChunk; t += kRows) {
          const bool keep = row + t < rows;
          ptx::cp_async_16(
              to + t * kRowBytes + (piece ^ (Swizzled ? swizzle<kRowBytes / 2>(t) : 0)) * kPiece,
              keep ? x : piece_, keep);
          x += kRows * stride;
        }
      }
    } else {
      load_elements<ElementBytes, kRowBytes, Swizzled>(
          tile, x - row * stride - lane % kPieces * kPiece, stride, rows, lane);
    }
    piece_ += kStep * stride;
  }

 private:
  const char* piece_;  // the lane's first piece of the next chunk
  int64_t stride_;     // bytes from token to token
};

template <class Cfg>
class Loader {
  static constexpr int K = Cfg::K;
  static constexpr int kStep = Cfg::kStep;

 public:
  __device__ Loader(const Problem& p, const Work& w, int slots, char* smem, int lane)
      : p_(p), w_(w), slots_(slots), smem_(smem), lane_(lane) {}

  __device__ void run() const {
    if (p_.g.dtype == DType::kF32) {
      load_all<4>();
    } else {
      load_all<2>();
    }
  }

 private:
  template <int GateBytes>
  __device__ __forceinline__ void load_all() const {
    TileLoader<2, K, true, kStep> k(p_.k, w_, w_.h, 0, lane_), q(p_.q, w_, w_.h, 0, lane_);
    TileLoader<GateBytes, K, GateBytes == 2, kStep> g(p_.g, w_, w_.hv, 0, lane_);
    TileLoader<2, Cfg::VS, true, kStep> v(p_.v, w_, w_.hv, w_.v0, lane_);
    Barriers* barriers = barriers_at(smem_);
    RingPosition at(0);
    int64_t left = w_.tokens;
#pragma unroll 1
    for (int c = 0; c < w_.chunks; ++c) {
      Slot<Cfg>* slot = slot_at<Cfg>(smem_, at.slot);
      const int rows = static_cast<int>(min(left, int64_t{kChunk}));
      const int lane = ptx::opaque_lane(lane_);
      ptx::mbarrier_wait_idle(&barriers->empty[at.slot], at.parity ^ 1);
      k.load(slot->k, rows, lane);
      q.load(slot->q, rows, lane);
      g.load(slot->g, rows, lane);
      if constexpr (Cfg::kMakers == 0) v.load(slot->v, rows, lane);
      ptx::cp_async_arrive(&barriers->raw[at.slot]);
      ptx::mbarrier_arrive(&barriers->raw[at.slot]);
      at.advance(1, slots_);
      left -= kStep;
    }
  }

  const Problem& p_;
  const Work& w_;
  int slots_;
  char* smem_;
  int lane_;
};

}  // namespace flashkda::cuda::sm80::prefill
