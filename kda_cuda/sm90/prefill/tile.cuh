// Where things lie in tiles of 128-byte rows, and the descriptors that name such tiles to wgmma.
#pragma once

#include <cstdint>

#include "../../common/tile.cuh"
#include "config.h"

namespace flashkda::cuda::sm90::prefill {

// Byte offset of a 16-byte piece of a row of 64 channels: the swizzle that the hardware calls
// 128-byte.
__device__ __forceinline__ int row_offset(int row, int piece) {
  return row * kRowBytes + ((piece ^ (row & 7)) * kPiece);
}

// The upper half of a descriptor: rows of 128 bytes, swizzled so, groups of eight of them adjacent.
inline constexpr uint32_t kDescriptorUpper = (8 * kRowBytes) >> 4 | 1u << 30;

// What a descriptor's lower half says of an address in shared memory. Offsets that leave the tile
// inside its block's shared memory may be added to it, over 16.
__device__ __forceinline__ uint32_t descriptor_address(uint32_t address) {
  return address >> 4 & 0x3fff;
}

// A tile whose swizzle begins at a multiple of 1024 bytes, from an address on. stride: bytes
// between blocks of 64 columns where the columns are N.
__device__ __forceinline__ uint64_t make_descriptor(uint32_t address, uint32_t stride) {
  return uint64_t{kDescriptorUpper} << 32 | (address | (stride >> 4) << 16);
}

}  // namespace flashkda::cuda::sm90::prefill
