#include "../instantiations.h"
#include "../kernel.cuh"

namespace flashkda::cuda::sm90::prefill {

FLASHKDA_PREFILL(Gate::kGiven);

template int find_resident_clusters<Halves>(const Target&);
template int find_resident_clusters<Fed>(const Target&);
template int find_resident_clusters<Helped>(const Target&);
template int find_resident_clusters<Threes>(const Target&);

}  // namespace flashkda::cuda::sm90::prefill
