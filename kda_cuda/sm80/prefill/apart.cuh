// Prefill by blocks that are apart, for few heads: what makes chunks leaves the SMs of the chains,
// and all slices of a head read the same chunks.
//
//   kMakers blocks a head, every kMakers-th chunk each:
//     loader ─► helpers ─► producers ─► helpers ─► putter ─► ring in global memory
//   V / VS blocks a head:
//     ring in global memory, v ─► taker ─► chain ─► o
//
// All of them have to be on SMs at once, since they wait for each other.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "../../common/smem.h"
#include "chain.cuh"
#include "config.h"
#include "helper.cuh"
#include "loader.cuh"
#include "producer.cuh"
#include "ring.cuh"
#include "stock.cuh"

namespace flashkda::cuda::sm80::prefill {

template <class Cfg>
__device__ __forceinline__ void make_chunks(const Problem& p, Work w, const Stock<Cfg>& stock,
                                            int maker, int readers, int slots, char* smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // The block's own chunks are those of a sequence that begins with the first of them.
  w.begin += maker * kChunk;
  w.tokens -= maker * kChunk;
  w.chunks = (w.chunks - maker + Cfg::kMakers - 1) / Cfg::kMakers;
  // Each scheduler has one of the first four warps.
  constexpr int kFirstProducer = 2 + kHelpers;
  if (warp == 0) {
    Putter<Cfg>(w, stock, maker, readers, slots, smem, lane).run();
  } else if (warp == 1) {
    Loader<Cfg>(p, w, slots, smem, lane).run();
  } else if (warp < kFirstProducer) {
    Helper<Cfg>(p, w, slots, smem, warp - 2, lane).run();
  } else {
    const int rank = warp - kFirstProducer;
    Producer<Cfg>(p, w, slots, smem, rank / kGroupWarps, rank % kGroupWarps, lane).run();
  }
}

template <class Cfg>
__global__ void __launch_bounds__(Cfg::kThreads, 1)
    apart_kernel(const __grid_constant__ Problem p, const __grid_constant__ Stock<Cfg> all,
                 int maker_slots, int reader_slots) {
  extern __shared__ __align__(256) char dynamic_smem[];
  char* smem =
      static_cast<char*>(ptx::shared_pointer(ptx::opaque(ptx::smem_address(dynamic_smem))));
  Barriers* barriers = barriers_at(smem);
  // In the order in which they start, so that no head waits for SMs that a later one holds.
  if (threadIdx.x == 0) barriers->block = atomicAdd(all.started, 1);
  __syncthreads();
  const int readers = p.V / Cfg::VS, team = Cfg::kMakers + readers;
  const int head = barriers->block / team, rank = barriers->block % team;
  const bool makes = rank < Cfg::kMakers;
  const Work w =
      find_work<kChunk>(p, head, makes ? 0 : (rank - Cfg::kMakers) * Cfg::VS, &barriers->sequence);
  const int slots = makes ? maker_slots : reader_slots;
  if (threadIdx.x < slots) {
    ptx::mbarrier_init(&barriers->raw[threadIdx.x], 2 * 32);  // cp.async and stores
    ptx::mbarrier_init(&barriers->tokens[threadIdx.x], 32);
    ptx::mbarrier_init(&barriers->factors[threadIdx.x], kGroupThreads);
    ptx::mbarrier_init(&barriers->full[threadIdx.x], makes ? 32 : 2 * 32);
    ptx::mbarrier_init(&barriers->empty[threadIdx.x], makes ? 32 : 32 * Cfg::kChainWarps);
  }
  __syncthreads();

  const Stock<Cfg> stock = all.of(head);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  static_assert(Cfg::kThreads > 32 * Cfg::kChainWarps);
  if (makes) {
    make_chunks<Cfg>(p, w, stock, rank, readers, slots, smem);
  } else if (warp < Cfg::kChainWarps) {
    Chain<Cfg>(p, w, slots, smem, warp, lane).run();
  } else if (warp == Cfg::kChainWarps) {
    Taker<Cfg>(p, w, stock, rank - Cfg::kMakers, slots, smem, lane).run();
  }
}

template <class Cfg>
cudaError_t launch_apart(const Problem& p, const Target& target, void* workspace,
                         cudaStream_t stream) {
  const int slots = count_slots<Cfg>(target.smem_limit);
  const size_t smem = smem_bytes<Cfg>(slots);
  cudaError_t error = allow_smem<apart_kernel<Cfg>>(smem, target.device);
  if (error != cudaSuccess) return error;
  const int64_t heads = p.N * p.HV;
  Stock<Cfg> stock;
  error = ApartLayout<Cfg>(heads).lay_out(workspace, stream, &stock);
  if (error != cudaSuccess) return error;
  const int64_t blocks = heads * (Cfg::kMakers + p.V / Cfg::VS);
  apart_kernel<Cfg><<<static_cast<unsigned>(blocks), Cfg::kThreads, smem, stream>>>(
      p, stock, slots, std::min(slots, kReaderSlots));
  return cudaGetLastError();
}

}  // namespace flashkda::cuda::sm80::prefill
