// Memory through which blocks that are apart hand chunks over.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace flashkda::cuda {

// How a call's lies in its workspace: a count of the blocks that have started, Flags of every team,
// and kPlaces chunks a team. What comes before the chunks begins at zero.
template <class Flags, class Chunk, int kPlaces>
class StockLayout {
 public:
  explicit StockLayout(int64_t teams)
      : chunks_((sizeof(Flags) * (teams + 1) + alignof(Chunk) - 1) / alignof(Chunk) *
                alignof(Chunk)),
        bytes_(chunks_ + sizeof(Chunk) * teams * kPlaces) {}

  int64_t bytes() const { return static_cast<int64_t>(bytes_); }

  // stock: {the count, the first team's flags, the first chunk}.
  template <class Stock>
  cudaError_t lay_out(void* workspace, cudaStream_t stream, Stock* stock) const {
    char* const begin = static_cast<char*>(workspace);
    *stock = {reinterpret_cast<unsigned*>(begin), reinterpret_cast<Flags*>(begin) + 1,
              reinterpret_cast<Chunk*>(begin + chunks_)};
    return cudaMemsetAsync(begin, 0, chunks_, stream);
  }

 private:
  size_t chunks_, bytes_;  // where the chunks begin, and the end
};

}  // namespace flashkda::cuda
