#include <cuda_runtime.h>

#include <climits>

#include "copy.h"

namespace flashkda::cuda::sm80::tokens {
namespace {

// A block turns a tile of 64 tokens by 64 channels: a warp reads 32 tokens of a channel and writes
// the 64 channels of a token, whole lines. Elements are read one by one, since rows of T elements
// begin anywhere for most T; the memory is busy all the same (docs/performance.md).
constexpr int kTile = 64;
constexpr int kPairs = kTile / 2;  // of channels: a word each
constexpr int kWarps = 8;

__host__ __device__ constexpr int64_t tiles(int64_t extent) { return (extent + kTile - 1) / kTile; }

__global__ void __launch_bounds__(32 * kWarps) copy_kernel(const __grid_constant__ Copy x) {
  // A word more a token, so that words of one channel lie in different banks.
  __shared__ uint32_t words[kTile][kPairs + 1];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t token_tiles = static_cast<uint32_t>(tiles(x.T));
  const int64_t b = blockIdx.x / token_tiles;
  const int64_t t0 = int64_t{blockIdx.x % token_tiles} * kTile;
  const int h = blockIdx.y, d0 = blockIdx.z * kTile;
  const int tokens = static_cast<int>(min(int64_t{kTile}, x.T - t0));
  // All loads are under way before the first is waited for: none is left out, those past the end
  // ask for the last token again.
  const uint16_t* from = static_cast<const uint16_t*>(x.from) + b * x.stride_b + h * x.stride_h +
                         (d0 + 2 * warp) * x.stride_d + t0;
  const int t[2] = {min(lane, tokens - 1), min(lane + 32, tokens - 1)};
  uint32_t loaded[kPairs / kWarps][2];
#pragma unroll
  for (int i = 0; i < kPairs / kWarps; ++i, from += 2 * kWarps * x.stride_d) {
    const uint16_t* const next = from + x.stride_d;
#pragma unroll
    for (int j = 0; j < 2; ++j) loaded[i][j] = __ldg(from + t[j]) | __ldg(next + t[j]) << 16;
  }
#pragma unroll
  for (int i = 0; i < kPairs / kWarps; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) words[lane + 32 * j][i * kWarps + warp] = loaded[i][j];
  }
  __syncthreads();
  const int64_t row = static_cast<int64_t>(x.heads) * x.D / 2;  // in words
  uint32_t* to = static_cast<uint32_t*>(x.to) + (b * x.T + t0 + warp) * row + (h * x.D + d0) / 2;
#pragma unroll
  for (int i = warp; i < kTile; i += kWarps, to += kWarps * row) {
    if (i < tokens) to[lane] = words[i][lane];
  }
}

}  // namespace

cudaError_t copy(const Copy& x, cudaStream_t stream) {
  const int64_t rows = x.B * tiles(x.T);
  if (rows == 0) return cudaSuccess;
  if (rows > INT_MAX) return cudaErrorInvalidValue;
  const dim3 blocks(static_cast<unsigned>(rows), x.heads, x.D / kTile);
  copy_kernel<<<blocks, 32 * kWarps, 0, stream>>>(x);
  return cudaGetLastError();
}

}  // namespace flashkda::cuda::sm80::tokens
