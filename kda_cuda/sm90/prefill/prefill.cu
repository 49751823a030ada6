#include <algorithm>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <limits>
#include <utility>

#include "../../common/stock.h"
#include "instantiations.h"
#include "maps.h"
#include "prefill.h"

namespace flashkda::cuda::sm90::prefill {
namespace {

template <class Cfg>
cudaError_t launch_heads(const Problem& p, const Target& target, cudaStream_t stream,
                         const Share& share) {
  switch (p.gate) {
    case Gate::kGiven:
      return launch_instance<Cfg, Gate::kGiven>(p, target, stream, share);
    case Gate::kSoftplus:
      return launch_instance<Cfg, Gate::kSoftplus>(p, target, stream, share);
    case Gate::kBounded:
      return launch_instance<Cfg, Gate::kBounded>(p, target, stream, share);
  }
  return cudaErrorInvalidValue;
}

// How many clusters the GPU holds at once.
template <class Cfg>
int resident_clusters(const Target& target) {
  if constexpr (Cfg::kCluster == 1) {
    return target.multiprocessors / Cfg::kTeam;
  } else {
    static std::atomic<int> known[kMaxDevices];  // plus one
    int clusters = known[target.device].load(std::memory_order_relaxed) - 1;
    if (clusters >= 0) return clusters;
    clusters = find_resident_clusters<Cfg>(target);
    known[target.device].store(clusters + 1, std::memory_order_relaxed);
    return clusters;
  }
}

// A step's time in units of 10 ns, as measured, times the rounds that all heads take.
template <class Cfg>
int64_t cost(int64_t heads, const Target& target, int step) {
  const int64_t resident = int64_t{resident_clusters<Cfg>(target)} * Cfg::kHeads;
  if (resident == 0) return std::numeric_limits<int64_t>::max();
  return (heads + resident - 1) / resident * step;
}

// How many of the heads Threes takes, in one round, if pairs of the SMs that its clusters leave
// idle can take the others; 0 if they cannot.
int64_t heads_by_threes(const Problem& p, int64_t heads, const Target& target) {
  if (p.HV % Threes::kHeads != 0) return 0;
  const int64_t clusters =
      std::min(int64_t{resident_clusters<Threes>(target)}, heads / Threes::kHeads);
  const int64_t others = heads - clusters * Threes::kHeads;
  const int64_t idle = target.multiprocessors - clusters * Threes::kCluster;
  return others * Halves::kCluster <= idle ? clusters * Threes::kHeads : 0;
}

// What goes through global memory begins some microseconds later than with Fed. From this mean
// length of a sequence on, Ample has made up for it.
constexpr int64_t kAmpleTokens = 1024;

// The ways of sharing heads among blocks (config.h).
enum class Way { kWhole, kThrees, kHalves, kHelped, kFed, kApart, kAmple };

// Chains are what takes the time. Where SMs would be idle, they take shares of a head's chain and
// of the making of chunks; results do not depend on it.
Way choose(const Problem& p, const Target& target) {
  const int64_t heads = p.N * p.HV;
  const int64_t never = std::numeric_limits<int64_t>::max();
  // Teams that are apart need memory each, of which no more than a round's is asked for.
  const bool apart = heads <= resident_clusters<Apart>(target);
  const int64_t length = p.cu_seqlens == nullptr ? p.T : p.T / std::max(p.N, int64_t{1});
  const bool ample = heads <= resident_clusters<Ample>(target) && length >= kAmpleTokens;
  const std::pair<int64_t, Way> ways[] = {
      {cost<Whole>(heads, target, 223), Way::kWhole},
      {heads_by_threes(p, heads, target) > 0 ? 188 : never, Way::kThrees},
      {cost<Halves>(heads, target, 133), Way::kHalves},
      {cost<Helped>(heads, target, 111), Way::kHelped},
      {cost<Fed>(heads, target, 90), Way::kFed},
      {apart ? 94 : never, Way::kApart},
      {ample ? 81 : never, Way::kAmple},
  };
  return std::min_element(std::begin(ways), std::end(ways),
                          [](const auto& x, const auto& y) { return x.first < y.first; })
      ->second;
}

using Layout = StockLayout<StockFlags, Slot, kStock>;

template <class Cfg>
cudaError_t launch_apart(const Problem& p, const Target& target, void* workspace,
                         cudaStream_t stream) {
  const int64_t heads = p.N * p.HV;
  Stock stock;
  const cudaError_t error = Layout(heads).lay_out(workspace, stream, &stock);
  if (error != cudaSuccess) return error;
  return launch_heads<Cfg>(p, target, stream, {0, heads, false, stock});
}

}  // namespace

bool serves(const Problem& p, const Target& target) {
  return target.capability == 90 && p.K == kChannels && p.V == kChannels &&
         p.q.dtype == DType::kBF16 && p.g.dtype != DType::kF16 && maps_fit(p);
}

int64_t workspace_bytes(const Problem& p, const Target& target) {
  const Way way = choose(p, target);
  const bool stocks = way == Way::kApart || way == Way::kAmple;
  return stocks ? Layout(p.N * p.HV).bytes() : 0;
}

cudaError_t launch(const Problem& p, const Target& target, void* workspace, cudaStream_t stream) {
  const int64_t heads = p.N * p.HV;
  if (heads == 0) return cudaSuccess;
  switch (choose(p, target)) {
    case Way::kWhole:
      return launch_heads<Whole>(p, target, stream, {0, heads});
    case Way::kHalves:
      return launch_heads<Halves>(p, target, stream, {0, heads});
    case Way::kHelped:
      return launch_heads<Helped>(p, target, stream, {0, heads});
    case Way::kFed:
      return launch_heads<Fed>(p, target, stream, {0, heads});
    case Way::kApart:
      return launch_apart<Apart>(p, target, workspace, stream);
    case Way::kAmple:
      return launch_apart<Ample>(p, target, workspace, stream);
    case Way::kThrees: {
      const int64_t by_threes = heads_by_threes(p, heads, target);
      const cudaError_t error = launch_heads<Threes>(p, target, stream, {0, by_threes});
      if (error != cudaSuccess || by_threes == heads) return error;
      return launch_heads<Halves>(p, target, stream, {by_threes, heads - by_threes, true});
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace flashkda::cuda::sm90::prefill
