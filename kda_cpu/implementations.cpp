#include "kda_cpu.h"

namespace flashkda::cpu {

namespace portable {
extern const Implementation kImplementation;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Implementation kImplementation;
}
namespace avx512 {
extern const Implementation kImplementation;
}
#endif

const std::vector<Implementation>& implementations() {
  static const std::vector<Implementation> usable = [] {
    std::vector<Implementation> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(avx512::kImplementation);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
      found.push_back(avx2::kImplementation);
#endif
    found.push_back(portable::kImplementation);
    return found;
  }();
  return usable;
}

}  // namespace flashkda::cpu
