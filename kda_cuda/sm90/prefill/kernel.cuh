// Prefill on Hopper: a block walks one (sequence, head, slice of V), or makes chunks for the blocks
// of its cluster that do.
#pragma once

#include <cuda_runtime.h>

#include "../../common/smem.h"
#include "chain.cuh"
#include "factors.cuh"
#include "instantiations.h"
#include "lone_step.cuh"
#include "maps.h"
#include "shared.cuh"
#include "squares.cuh"
#include "turn.cuh"

namespace flashkda::cuda::sm90::prefill {

// By a warp.
__device__ __forceinline__ void load_gate(HeadGate& gate, const Problem& p, int hv, int lane) {
  const DecayParams params = load_decay_params(p, hv);
  const auto shift = [&](int c) { return load_shift(p, params, hv, lane * 4 + c); };
  gate.shift[lane] = make_float4(shift(0), shift(1), shift(2), shift(3));
  if (lane == 0) gate.params = params;
}

// For one gate: with the code of all three, what warps at many places of it run shares less of the
// instruction caches (docs/performance.md, version 20).
template <class Cfg, Gate kGate>
__global__ void __cluster_dims__(Cfg::kCluster, 1, 1) __launch_bounds__(Cfg::kThreads, 1)
    prefill_kernel(const __grid_constant__ Problem p, const __grid_constant__ Maps maps,
                   const int first_head, const Stock stock) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  // What this grid leaves over of the heads may be worked on beside it.
  if constexpr (Cfg::kHeads > 1) ptx::launch_dependents();
  extern __shared__ __align__(1024) char smem[];
  // From a register: the block's window in shared memory would be found anew for every use.
  const int base = ptx::opaque(static_cast<int>(ptx::smem_address(smem)));
  Shared<Cfg>& s = *static_cast<Shared<Cfg>*>(__cvta_shared_to_generic(base));
  int block = blockIdx.x;
  if constexpr (Cfg::kApart) {
    // In the order in which they start, so that no team waits for SMs that a later one holds.
    if (threadIdx.x == 0) s.block = atomicAdd(stock.started, 1);
    __syncthreads();
    block = s.block;
  }
  const int rank = block % Cfg::kTeam, team = block / Cfg::kTeam;
  const bool chains = has_chain<Cfg>(rank);
  const int64_t head =
      first_head + int64_t{team} * Cfg::kHeads + (Cfg::kHeads > 1 && chains ? rank : 0);
  const Work found =
      find_work<kChunk>(p, head, Cfg::kHeads == 1 && chains ? rank * Cfg::VS : 0, &s.sequence);
  const int group = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  __builtin_assume(warp >= 0);
  // Shuffled, lest the assembler read it anew, slowly, wherever it is used.
  const int lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32);
  __builtin_assume(lane >= 0 && lane < 32);

  if (const int i = warp - 4; i >= 0 && i < (chains ? 1 : Cfg::kHeads)) {
    HeadGate& gate = Cfg::kHeads > 1 && !chains ? s.gates[i] : s.gate;
    load_gate(gate, p, found.hv + i, lane);
  }
  if (threadIdx.x == 32) {
    for (const CUtensorMap* map : {&maps.g, &maps.k, &maps.q, &maps.v, &maps.o})
      ptx::prefetch_map(map);
  }
  if (threadIdx.x == 0) {
    s.work = found;
    if constexpr (Cfg::kApart) {
      s.stock = {stock.started, stock.flags + team, stock.chunks + team * kStock};
    }
    for (int i = 0; i < Cfg::kHeads; ++i) {
      const int hv = found.hv + i;
      s.origins[i] = {static_cast<int>(found.begin), static_cast<int>(found.row), hv / (p.HV / p.H),
                      hv, found.v0 / kHalf};
    }
    constexpr int kChainThreads = Cfg::kChainGroups * kGroupThreads;
    for (int i = 0; i < Cfg::kUses; ++i) {
      ptx::mbarrier_init(&s.raw_full[i], 2);
      ptx::mbarrier_init(&s.raw_empty[i], 2 * 32);
      for (uint64_t& norms : s.norms[i]) ptx::mbarrier_init(&norms, 32);
      ptx::mbarrier_init(&s.factors_full[i], kFactorArrivals<Cfg>);
    }
    for (int i = 0; i < Cfg::kEmptied; ++i) {
      const int readers = !Cfg::kApart ? Cfg::kReaders : chains ? 1 : 0;
      ptx::mbarrier_init(&s.empty[i], readers * kChainThreads + (chains ? 0 : 2 * 32));
    }
    for (int i = 0; i < Cfg::kSlots; ++i) {
      // By the square warp of either part, or by who announces what another block sends; and by v's
      // load.
      const int makers = maker_of<Cfg>(i, rank).rank == rank ? 2 * 32 : 1;
      ptx::mbarrier_init(&s.full[i], makers + 1);
      ptx::mbarrier_init(&s.values_empty[i], kChainThreads);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if constexpr (Cfg::kCluster > 1) ptx::cluster_sync();
  const Work& w = s.work;

  constexpr int kSquareGroup = Cfg::kChainGroups + Cfg::kFactorGroups;
  if (group < Cfg::kChainGroups && chains) {
    ptx::more_registers<Cfg::kChainRegisters>();
    Chain<Cfg>(p, maps, w, s, rank, warp, lane).run();
  } else if (!makes_chunks<Cfg>(rank)) {
    ptx::fewer_registers<Cfg::kIdleRegisters>();
    const int square = warp - 4 * kSquareGroup;
    if (square == 0) {
      Loader<Cfg>(p, maps, s).load_all_values(static_cast<int>(w.tokens));
    } else if (Cfg::kApart && square == 2) {
      Loader<Cfg>(p, maps, s).take_chunks(rank, w.chunks, lane);
    }
  } else if (group < kSquareGroup) {
    ptx::fewer_registers<Cfg::kFactorRegisters>();
    const int factor = group < Cfg::kChainGroups ? Cfg::kFactorGroups : group - Cfg::kChainGroups;
    if (factor < factor_groups<Cfg>(rank)) {
      FactorWarp<Cfg, kGate>(p, w, s, rank, factor, warp % 4, lane).run();
    }
  } else {
    ptx::fewer_registers<Cfg::kSquareRegisters>();
    const int square = warp - 4 * kSquareGroup;
    if (!makes_few<Cfg>(rank) || square < 2) {
      SquareWarp<Cfg>(p, maps, w, s, rank, square, lane).run();
    } else if (square == 2) {
      Loader<Cfg>(p, maps, s).load_all_values(static_cast<int>(w.tokens));
    }
  }
  // Others may still arrive at this block's barriers.
  if constexpr (Cfg::kCluster > 1) ptx::cluster_sync();
  // Who waits for this grid waits for the one that it runs beside, too.
  if constexpr (Cfg::kCluster == 2) ptx::wait_for_dependencies();
#endif
}

template <class Cfg, Gate kGate>
cudaError_t launch_instance(const Problem& p, const Target& target, cudaStream_t stream,
                            const Share& share) {
  constexpr auto kKernel = prefill_kernel<Cfg, kGate>;
  constexpr int kBytes = sizeof(Shared<Cfg>);
  static_assert(kBytes <= 227 * 1024, "a block has no more shared memory on Hopper");
  Maps maps;
  cudaError_t error = make_maps(p, Cfg::VS, &maps);
  if (error == cudaSuccess) error = allow_smem<kKernel>(kBytes, target.device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(share.heads / Cfg::kHeads * Cfg::kTeam));
  config.blockDim = dim3(Cfg::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = share.beside ? 1 : 0;
  return cudaLaunchKernelEx(&config, kKernel, p, maps, static_cast<int>(share.first_head),
                            share.stock);
}

template <class Cfg>
int find_resident_clusters(const Target& target) {
  constexpr auto kKernel = prefill_kernel<Cfg, Gate::kGiven>;
  constexpr int kBytes = sizeof(Shared<Cfg>);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Cfg::kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(target.multiprocessors / Cfg::kCluster * Cfg::kCluster);
  config.blockDim = dim3(Cfg::kThreads);
  config.dynamicSmemBytes = kBytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (allow_smem<kKernel>(kBytes, target.device) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, kKernel, &config) == cudaSuccess) {
    return clusters;
  }
  cudaGetLastError();  // it is not the launch's
  return 0;
}

}  // namespace flashkda::cuda::sm90::prefill
