#include "maps.h"

#include <cstdint>
#include <limits>

#include "config.h"

namespace flashkda::cuda::sm90::prefill {
namespace {

constexpr int64_t kAlignment = 16;  // bytes, of addresses and strides

int bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// A stride along which there is nothing to step over may be anything.
bool stride_fits(int64_t stride, int64_t extent, int bytes) {
  return extent == 1 ||
         (stride > 0 && stride * bytes % kAlignment == 0 && stride * bytes < int64_t{1} << 40);
}

bool fits(const TokenTensor& x, const Problem& p, int heads) {
  const int bytes = bytes_of(x.dtype);
  return reinterpret_cast<uintptr_t>(x.ptr) % kAlignment == 0 &&
         stride_fits(x.stride_b, p.B, bytes) && stride_fits(x.stride_t, p.T, bytes) &&
         stride_fits(x.stride_h, heads, bytes);
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                            CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                            CUtensorMapFloatOOBfill);

// The driver's function, found through the runtime so that nothing links against the driver.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  return error == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Encode>(function)
             : nullptr;
}

// What a copy moves of one head: so many tokens, of `columns` columns of 128 bytes or of `bytes` of
// one of them.
struct Box {
  int tokens, columns, bytes;
  CUtensorMapSwizzle swizzle;
};

// Channels are two dimensions, so that a box's columns of 128 bytes follow each other in shared
// memory.
cudaError_t encode(Encode function, CUtensorMap* map, const TokenTensor& x, const Problem& p,
                   int heads, const Box& of) {
  const int bytes = bytes_of(x.dtype);
  const CUtensorMapDataType type = x.dtype == DType::kF32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : x.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto stride = [&](int64_t elements, int64_t extent) {
    return static_cast<cuuint64_t>(extent == 1 ? kAlignment : elements * bytes);
  };
  const int width = kRowBytes / bytes;
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(p.T),
                               static_cast<cuuint64_t>(kChannels / width),
                               static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(p.B)};
  const cuuint64_t strides[4] = {stride(x.stride_t, p.T), kRowBytes, stride(x.stride_h, heads),
                                 stride(x.stride_b, p.B)};
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(of.bytes / bytes),
                             static_cast<cuuint32_t>(of.tokens),
                             static_cast<cuuint32_t>(of.columns), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      function(map, type, 5, x.ptr, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               of.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

bool maps_fit(const Problem& p) {
  return p.T > 0 && p.T <= std::numeric_limits<int32_t>::max() - 2 * kChunk && fits(p.q, p, p.H) &&
         fits(p.k, p, p.H) && fits(p.v, p, p.HV) && fits(p.g, p, p.HV) && fits(p.o, p, p.HV);
}

cudaError_t make_maps(const Problem& p, int value_columns, Maps* maps) {
  static const Encode function = find_encode();
  if (function == nullptr) return cudaErrorSymbolNotFound;
  const auto rows = [](int tokens, int columns) {
    return Box{tokens, columns, kRowBytes, CU_TENSOR_MAP_SWIZZLE_128B};
  };
  const Box outputs = {kChunk, 1, kPart * bytes_of(p.o.dtype), CU_TENSOR_MAP_SWIZZLE_32B};
  cudaError_t error = encode(function, &maps->q, p.q, p, p.H, rows(kChunk, 2));
  if (error == cudaSuccess) error = encode(function, &maps->k, p.k, p, p.H, rows(kChunk, 2));
  if (error == cudaSuccess)
    error = encode(function, &maps->v, p.v, p, p.HV, rows(kChunk, value_columns / kHalf));
  if (error == cudaSuccess)
    error = encode(function, &maps->g, p.g, p, p.HV, rows(kChunk, bytes_of(p.g.dtype)));
  if (error == cudaSuccess) error = encode(function, &maps->o, p.o, p, p.HV, outputs);
  return error;
}

}  // namespace flashkda::cuda::sm90::prefill
