// Token tiles in shared memory: rows of 16-byte pieces, piece p of row t at p ^ swizzle(t), so that
// neither eight rows of one piece (ldmatrix), nor a row, nor four neighbouring pieces of rows t and
// t + 8 (a producer's warp) meet in a bank.
#pragma once

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>

#include "ptx.cuh"

namespace flashkda::cuda {

inline constexpr int kPiece = 16;  // bytes

// Linear: swizzle(a ^ b) is swizzle(a) ^ swizzle(b).
template <int Columns>
__host__ __device__ constexpr int swizzle(int row) {
  static_assert(Columns == 32 || Columns % 64 == 0, "a row is half a line of banks or whole lines");
  return Columns == 32 ? (row >> 1) & 3 : (row & 7) ^ ((row >> 1) & 4);
}

// Byte offset of a piece in a tile of 16-bit columns.
template <int Columns>
__host__ __device__ constexpr int tile_offset(int row, int piece) {
  return row * Columns * 2 + ((piece ^ swizzle<Columns>(row)) * kPiece);
}

// From a piece of a tile that is aligned to 256 bytes, `at` in shared memory, to the piece 2 n
// after it; its own number is below 2. One instruction where tile_offset takes three.
__device__ __forceinline__ const void* pieces_on(uint32_t at, int n) {
  return ptx::shared_pointer(at ^ (n * 2 * kPiece));
}

// Byte offset of a piece in a 16 x 16 tile, whose rows are two pieces long.
__host__ __device__ constexpr int square_offset(int row, int piece) {
  return row * 32 + ((piece ^ ((row >> 2) & 1)) * kPiece);
}

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* smem) {
  cute::SM75_U32x4_LDSM_N::copy(*static_cast<const cute::uint128_t*>(smem), r[0], r[1], r[2], r[3]);
}

__device__ __forceinline__ void ldmatrix_trans(uint32_t (&r)[4], const void* smem) {
  cute::SM75_U16x8_LDSM_T::copy(*static_cast<const cute::uint128_t*>(smem), r[0], r[1], r[2], r[3]);
}

// Which (row, piece) a lane addresses in a 16 x 16 block so that ldmatrix returns
//   by_row:    rows 0-7 and 8-15 of piece 0, then of piece 1: an A fragment; transposed, a B
//   fragment whose k are the rows by_column: pieces 0 and 1 of rows 0-7, then of rows 8-15: a B
//   fragment whose n are the rows
struct LanePosition {
  int row, piece;
};

__device__ __forceinline__ LanePosition by_row(int lane) {
  return {(lane & 7) + ((lane >> 3) & 1) * 8, lane >> 4};
}

__device__ __forceinline__ LanePosition by_column(int lane) {
  return {(lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1};
}

__device__ __forceinline__ LanePosition by_piece(int lane) { return {lane & 7, lane >> 3}; }

}  // namespace flashkda::cuda
