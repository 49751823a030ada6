#pragma once
#include "../../sm80/prefill/work.cuh"
namespace flashkda::cuda::sm90::prefill {
using Work = sm80::prefill::Work;
using sm80::prefill::find_work;
}  // namespace flashkda::cuda::sm90::prefill
