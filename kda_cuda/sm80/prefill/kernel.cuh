// Prefill on any GPU from compute capability 8.0 on: one block walks one (sequence, head, slice of
// V).
//
//   chain      VS / 16 warps            S through the chunks             (chain.cuh)
//   producers  2 or 3 groups of 4 warps loads (loader.cuh), then raw chunks to factors, in turn
//   (producer.cuh)
//   helpers    with slices of 32 columns 2 warps  norms, diagonals, beta; triangles (producer.cuh)
//
//                   raw                       full
//   global memory ───────► producer c % P ───────────► chain ───► o
//         ▲                                              │
//         └─────────────────── empty ────────────────────┘   chunk c lies in slot c % slots of a
//         ring in shared memory
#pragma once

#include <cuda_runtime.h>

#include "../../common/smem.h"
#include "chain.cuh"
#include "config.h"
#include "producer.cuh"
#include "ring.cuh"

namespace flashkda::cuda::sm80::prefill {

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    prefill_kernel(const __grid_constant__ Problem p, const __grid_constant__ Ring ring) {
  extern __shared__ __align__(128) char smem[];
  Barriers* barriers = barriers_at(smem);
  const int64_t slices = p.V / Cfg::VS;
  const Work w = find_work<kChunk>(
      p, blockIdx.x / slices, static_cast<int>(blockIdx.x % slices) * Cfg::VS, &barriers->sequence);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // Every thread arrives for itself. One of a warp would do, and is no faster; but it is threads
  // that racecheck follows.
  if (threadIdx.x < ring.slots) {
    ptx::mbarrier_init(&barriers->raw[threadIdx.x], 2 * kGroupThreads);  // cp.async and stores
    ptx::mbarrier_init(&barriers->tokens[threadIdx.x], 32);
    ptx::mbarrier_init(&barriers->triangle[threadIdx.x], kGroupThreads);
    ptx::mbarrier_init(&barriers->full[threadIdx.x], kGroupThreads + (Cfg::kHelpers > 0 ? 32 : 0));
    ptx::mbarrier_init(&barriers->empty[threadIdx.x], 32 * Cfg::kChainWarps);
  }
  __syncthreads();

  if (warp < Cfg::kChainWarps) {
    Chain<Cfg>(p, w, ring, smem, warp, lane).run();
  } else if (Cfg::kHelpers > 0 && warp == Cfg::kThreads / 32 - 2) {
    make_tokens<Cfg>(p, w, ring, smem, lane);
  } else if (Cfg::kHelpers > 0 && warp == Cfg::kThreads / 32 - 1) {
    invert_triangles<Cfg>(w, ring, smem, lane);
  } else {
    const int group = (warp - Cfg::kChainWarps) / kGroupWarps;
    const int rank = (warp - Cfg::kChainWarps) % kGroupWarps;
    if (group < ring.producers) Producer<Cfg>(p, w, ring, smem, group, rank, lane).run();
  }
}

template <class Cfg>
cudaError_t launch_instance(const Problem& p, const Target& target, cudaStream_t stream) {
  const Ring ring = make_ring<Cfg>(target.smem_limit);
  const size_t bytes = smem_bytes<Cfg>(ring);
  const cudaError_t error = allow_smem<prefill_kernel<Cfg>>(bytes, target.device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = p.N * p.HV * (p.V / Cfg::VS);
  prefill_kernel<Cfg><<<static_cast<unsigned>(blocks), Cfg::kThreads, bytes, stream>>>(p, ring);
  return cudaGetLastError();
}

}  // namespace flashkda::cuda::sm80::prefill
