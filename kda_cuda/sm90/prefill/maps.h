// What the copy engine is told of the tensors, and whether it can follow them.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../../common/params.h"

namespace flashkda::cuda::sm90::prefill {

struct Maps {
  CUtensorMap q, k, v, g, o;
};

bool maps_fit(const Problem& p);
// value_columns: of a block.
cudaError_t make_maps(const Problem& p, int value_columns, Maps* maps);

}  // namespace flashkda::cuda::sm90::prefill
