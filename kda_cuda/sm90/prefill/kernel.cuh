// Prefill on Hopper: one block walks one (sequence, head, slice of V).
#pragma once

#include <cuda_runtime.h>

#include "chain.cuh"
#include "factors.cuh"
#include "shared.cuh"
#include "squares.cuh"

namespace flashkda::cuda::sm90::prefill {

template <class Cfg>
__global__ void __cluster_dims__(Cfg::kCluster, 1, 1) __launch_bounds__(Cfg::kThreads, 1)
    prefill_kernel(const __grid_constant__ Problem p, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char smem[];
  // From a register: the block's window in shared memory would be found anew for every use.
  const int base = ptx::opaque(static_cast<int>(ptx::smem_address(smem)));
  Shared<Cfg>& s = *static_cast<Shared<Cfg>*>(__cvta_shared_to_generic(base));
  const Work found = find_work<Cfg::VS, kChunk>(p, &s.sequence);
  const int group = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  __builtin_assume(warp >= 0);
  // Shuffled, lest the assembler read it anew, slowly, wherever it is used.
  const int lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);
  __builtin_assume(lane >= 0 && lane < 32);

  if (threadIdx.x == 0) {
    s.work = found;
    s.origin = {static_cast<int>(found.begin), static_cast<int>(found.row), found.h, found.hv,
                found.v0 / kHalf};
    constexpr int kChainThreads = Cfg::kChainGroups * kGroupThreads;
    for (int i = 0; i < kRaw; ++i) {
      ptx::mbarrier_init(&s.raw_full[i], 1);
      ptx::mbarrier_init(&s.raw_empty[i], 32);
      ptx::mbarrier_init(&s.norms[i], 32);
      for (int quarter = 0; quarter < 4; ++quarter) {
        ptx::mbarrier_init(&s.meeting[i][quarter], kMeetingThreads);
      }
    }
    for (int i = 0; i < Cfg::kOwn; ++i) {
      ptx::mbarrier_init(&s.factors_full[i], kGroupThreads);
      // Within a block every chain thread arrives for itself, over a cluster a warp does.
      ptx::mbarrier_init(&s.empty[i],
                         Cfg::kCluster > 1 ? Cfg::kCluster * kChainThreads / 32 : kChainThreads);
    }
    for (int i = 0; i < Cfg::kSlots; ++i) {
      ptx::mbarrier_init(&s.full[i], 2);  // by parts, as v
      ptx::mbarrier_init(&s.values_full[i], 2);
      ptx::mbarrier_init(&s.values_empty[i], kChainThreads);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if constexpr (Cfg::kCluster > 1) ptx::cluster_sync();
  const Work& w = s.work;

  if (group < Cfg::kChainGroups) {
    ptx::more_registers<Cfg::kChainRegisters>();
    Chain<Cfg>(p, w, s, warp, lane).run();
  } else if (group < Cfg::kChainGroups + Cfg::kFactorGroups) {
    ptx::fewer_registers<Cfg::kFactorRegisters>();
    FactorWarp<Cfg>(p, w, s, warp - 4 * Cfg::kChainGroups, lane).run();
  } else {
    ptx::fewer_registers<Cfg::kSquareRegisters>();
    const int rank = warp - 4 * (Cfg::kChainGroups + Cfg::kFactorGroups);
    SquareWarp<Cfg>(p, maps, w, s, rank, lane).run();
  }
  // Others may still arrive at this block's barriers.
  if constexpr (Cfg::kCluster > 1) ptx::cluster_sync();
#endif
}

}  // namespace flashkda::cuda::sm90::prefill
