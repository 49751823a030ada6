// The op that copies tokens into the order that kernels follow.
#include "../sm80/tokens/copy.h"
#include "convert.h"
#include "device.h"
#include "kda_api.h"

namespace flashkda::cuda {

void copy_tokens(const Tensor& x, Tensor to) {
  const int device = x.get_device_index();
  const Launch launch(device);
  const sm80::tokens::Copy copy = {.from = x.data_ptr(),
                                   .to = to.data_ptr(),
                                   .B = x.size(0),
                                   .T = x.size(1),
                                   .heads = static_cast<int>(x.size(2)),
                                   .D = static_cast<int>(x.size(3)),
                                   .stride_b = x.stride(0),
                                   .stride_h = x.stride(2),
                                   .stride_d = x.stride(3)};
  check_launch(sm80::tokens::copy(copy, launch.stream()), "copy_tokens", device);
}

}  // namespace flashkda::cuda
