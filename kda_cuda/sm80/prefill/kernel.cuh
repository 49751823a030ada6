// Prefill on any GPU from compute capability 8.0 on: one block walks one (sequence, head, slice of
// V) and makes its chunks (apart.cuh: with few heads, others make them).
//
//   chain      VS / 16 warps                      S through the chunks           (chain.cuh)
//   helpers    2 warps, in turn                   what comes of tokens alone; T, M  (helper.cuh)
//   producers  1 or 2 groups of 4 warps, in turn  raw chunks to factors          (producer.cuh)
//   loader     1 warp                             q, k, v, g                     (loader.cuh)
//
//                          raw             tokens              factors          full
//   global memory ─► loader ───► helper c % 2 ───► producer c % P ───► helper c % 2 ───► chain ─► o
//                      ▲  └────────── raw ───────────────▲                                │
//                      └───────────────────────────── empty ─────────────────────────────┘
//
// Chunk c lies in slot c % slots of a ring in shared memory. No warp has more of a chunk to do than
// a chain's step takes, or there are two of them.
#pragma once

#include <cuda_runtime.h>

#include "../../common/smem.h"
#include "chain.cuh"
#include "config.h"
#include "helper.cuh"
#include "loader.cuh"
#include "producer.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    prefill_kernel(const __grid_constant__ Problem p, int slots) {
  extern __shared__ __align__(256) char dynamic_smem[];
  // An address of which the compiler does not know that it could find it again: on Hopper that
  // takes a special register, over and over.
  char* smem =
      static_cast<char*>(ptx::shared_pointer(ptx::opaque(ptx::smem_address(dynamic_smem))));
  Barriers* barriers = barriers_at(smem);
  const int64_t slices = p.V / Cfg::VS;
  const Work w = find_work<kChunk>(
      p, blockIdx.x / slices, static_cast<int>(blockIdx.x % slices) * Cfg::VS, &barriers->sequence);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Every thread arrives for itself. One of a warp would do, and is no faster; but it is threads
  // that racecheck follows.
  if (threadIdx.x < slots) {
    ptx::mbarrier_init(&barriers->raw[threadIdx.x], 2 * 32);  // cp.async and stores
    ptx::mbarrier_init(&barriers->tokens[threadIdx.x], 32);
    ptx::mbarrier_init(&barriers->factors[threadIdx.x], kGroupThreads);
    ptx::mbarrier_init(&barriers->full[threadIdx.x], 32);
    ptx::mbarrier_init(&barriers->empty[threadIdx.x], 32 * Cfg::kChainWarps);
  }
  __syncthreads();

  constexpr int kFirstProducer = Cfg::kChainWarps + kHelpers;
  if (warp < Cfg::kChainWarps) {
    Chain<Cfg>(p, w, slots, smem, warp, lane).run();
  } else if (warp < kFirstProducer) {
    Helper<Cfg>(p, w, slots, smem, warp - Cfg::kChainWarps, lane).run();
  } else if (warp < Cfg::kLoaderWarp) {
    const int rank = warp - kFirstProducer;
    Producer<Cfg>(p, w, slots, smem, rank / kGroupWarps, rank % kGroupWarps, lane).run();
  } else {
    Loader<Cfg>(p, w, slots, smem, lane).run();
  }
}

template <class Cfg>
cudaError_t launch_instance(const Problem& p, const Target& target, cudaStream_t stream) {
  const int slots = count_slots<Cfg>(target.smem_limit);
  const size_t bytes = smem_bytes<Cfg>(slots);
  const cudaError_t error = allow_smem<prefill_kernel<Cfg>>(bytes, target.device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.N * p.HV * (p.V / Cfg::VS);
  prefill_kernel<Cfg><<<static_cast<unsigned>(blocks), Cfg::kThreads, bytes, stream>>>(p, slots);
  return cudaGetLastError();
}

}  // namespace flashkda::cuda::sm80::prefill
