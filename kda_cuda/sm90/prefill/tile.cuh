// Where things lie in tiles of 128-byte rows, and the descriptors that name such tiles to wgmma.
#pragma once

#include <cstdint>

#include "../../common/tile.cuh"
#include "shared.cuh"

namespace flashkda::cuda::sm90::prefill {

inline constexpr int kRowBytes = 128;

// Byte offset of a 16-byte piece of a row of 64 channels: the swizzle that the hardware calls
// 128-byte.
__device__ __forceinline__ int row_offset(int row, int piece) {
  return row * kRowBytes + ((piece ^ (row & 7)) * kPiece);
}

// The same in a tile of two halves of kRows rows; piece counts from 0 to 15.
template <int kRows>
__device__ __forceinline__ int halves_offset(int row, int piece) {
  return (piece / 8) * kRows * kRowBytes + row_offset(row, piece % 8);
}

// A tile of 128-byte rows whose swizzle begins at a multiple of 1024 bytes. stride_leading: bytes
// between blocks of 64 columns where the columns are N.
__device__ __forceinline__ uint64_t make_descriptor(const void* tile, int stride_leading) {
  constexpr uint64_t kSwizzle128 = 1;
  constexpr uint64_t kEightRows = 8 * kRowBytes;
  const uint64_t address = ptx::smem_address(tile);
  return (address >> 4 & 0x3fff) | static_cast<uint64_t>(stride_leading >> 4) << 16 |
         (kEightRows >> 4) << 32 | kSwizzle128 << 62;
}

}  // namespace flashkda::cuda::sm90::prefill
