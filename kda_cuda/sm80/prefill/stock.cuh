// How chunks get from the blocks that make them to those that walk a head, which are apart: through
// a ring in global memory.
#pragma once

#include <climits>
#include <cstdint>

#include "../../common/ptx.cuh"
#include "loader.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

// Of what a reader has of a slot from the ring.
template <class Cfg>
__device__ __forceinline__ char* first_piece(Slot<Cfg>* slot) {
  return reinterpret_cast<char*>(slot) + StockChunk<Cfg>::kBegin;
}

// Puts a block's chunks into the ring.
template <class Cfg>
class Putter {
  static constexpr int kPieces = sizeof(StockChunk<Cfg>::bytes) / kPiece;

 public:
  // maker: which of the head's it is. readers: how many blocks walk the head.
  __device__ Putter(const Work& w, const Stock<Cfg>& stock, int maker, int readers, int slots,
                    char* smem, int lane)
      : w_(w),
        stock_(stock),
        maker_(maker),
        readers_(readers),
        slots_(slots),
        smem_(smem),
        lane_(lane) {}

  __device__ void run() const {
    static_assert(kStock % Cfg::kMakers == 0, "a place has one maker");
    RingPosition at(0);
    int taken = 0;  // by the lane's reader; looked at for later, when it will have come
#pragma unroll 1
    for (int i = 0; i < w_.chunks; ++i) {
      taken = put(i * Cfg::kMakers + maker_, at, taken);
      at.advance(1, slots_);
    }
  }

 private:
  __device__ __forceinline__ int load_taken(int lane) const {
    return lane < readers_ ? ptx::load_relaxed(&stock_.flags->taken[lane]) : INT_MAX;
  }

  __device__ __forceinline__ int put(int chunk, const RingPosition& at, int taken) const {
    Slot<Cfg>* slot = slot_at<Cfg>(smem_, at.slot);
    Barriers* barriers = barriers_at(smem_);
    const int lane = ptx::opaque_lane(lane_);
    // Until all readers have read the chunk that lies there.
    while (!__all_sync(~0u, taken >= chunk + 1 - kStock)) taken = load_taken(lane);
    ptx::mbarrier_wait_idle(&barriers->full[at.slot], at.parity);
    const char* from = first_piece<Cfg>(slot) + lane * kPiece;
    taken = load_taken(lane);
    char* to = stock_.chunks[chunk % kStock].bytes + lane * kPiece;
    constexpr int kRounds = kPieces / 32, kBatch = 14;  // loads on their way at a time
    static_assert(kRounds % kBatch == 0);
#pragma unroll
    for (int i = 0; i < kRounds; i += kBatch) {
      uint4 x[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        x[j] = *reinterpret_cast<const uint4*>(from + (i + j) * 32 * kPiece);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        *reinterpret_cast<uint4*>(to + (i + j) * 32 * kPiece) = x[j];
      }
    }
    if (lane < kPieces % 32) {
      *reinterpret_cast<uint4*>(to + kRounds * 32 * kPiece) =
          *reinterpret_cast<const uint4*>(from + kRounds * 32 * kPiece);
    }
    ptx::mbarrier_arrive(&barriers->empty[at.slot]);
    __syncwarp();
    if (lane == 0) ptx::store_release(&stock_.flags->put[chunk % kStock], chunk / kStock + 1);
    return taken;
  }

  const Work& w_;
  const Stock<Cfg>& stock_;
  int maker_, readers_, slots_;
  char* smem_;
  int lane_;
};

// Brings all chunks of a head from the ring, and the block's columns of v.
template <class Cfg>
class Taker {
  static constexpr int kPieces = sizeof(StockChunk<Cfg>::bytes) / kPiece;

 public:
  __device__ Taker(const Problem& p, const Work& w, const Stock<Cfg>& stock, int reader, int slots,
                   char* smem, int lane)
      : p_(p), w_(w), stock_(stock), reader_(reader), slots_(slots), smem_(smem), lane_(lane) {}

  __device__ void run() const {
    TileLoader<2, Cfg::VS, true, kChunk> v(p_.v, w_, w_.hv, w_.v0, lane_);
    Barriers* barriers = barriers_at(smem_);
    StockFlags* flags = stock_.flags;
    RingPosition at(0);
    int64_t left = w_.tokens;
    int put = 0;  // chunks that are known to be there
#pragma unroll 1
    for (int c = 0; c < w_.chunks; ++c) {
      Slot<Cfg>* slot = slot_at<Cfg>(smem_, at.slot);
      const int rows = static_cast<int>(min(left, int64_t{kChunk}));
      ptx::mbarrier_wait_idle(&barriers->empty[at.slot], at.parity ^ 1);
      // What is given back has been read: the flag need not be ordered behind it.
      if (lane_ == 0 && c >= slots_) ptx::store_relaxed(&flags->taken[reader_], c - slots_ + 1);
      v.load(slot->v, rows, lane_);
      // A look shows all places: how many of the chunks from `put` on, up to a round's, are there.
      while (put == c) {
        const int next = put + lane_;
        const unsigned uses = ptx::load_acquire(&flags->put[next % kStock]);
        const unsigned there = __ballot_sync(~0u, lane_ < kStock && uses == next / kStock + 1);
        put += __ffs(~there) - 1;
      }
      __syncwarp();
      char* to = first_piece<Cfg>(slot) + lane_ * kPiece;
      const char* from = stock_.chunks[c % kStock].bytes + lane_ * kPiece;
      constexpr int kRounds = kPieces / 32;
#pragma unroll
      for (int i = 0; i < kRounds; ++i) {
        ptx::cp_async_16(to + i * 32 * kPiece, from + i * 32 * kPiece, true);
      }
      if (lane_ < kPieces % 32) {
        ptx::cp_async_16(to + kRounds * 32 * kPiece, from + kRounds * 32 * kPiece, true);
      }
      ptx::cp_async_arrive(&barriers->full[at.slot]);
      ptx::mbarrier_arrive(&barriers->full[at.slot]);
      at.advance(1, slots_);
      left -= kChunk;
    }
  }

 private:
  const Problem& p_;
  const Work& w_;
  const Stock<Cfg>& stock_;
  int reader_, slots_;
  char* smem_;
  int lane_;
};

}  // namespace flashkda::cuda::sm80::prefill
