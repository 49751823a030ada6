// Kimi Delta Attention on CPU. Free of torch; what it is told stands in problem.h.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "problem.h"

namespace flashkda::cpu {

// Lends threads: run(n, body) calls body(i) once for every i in [0, n), n <= count, at the same
// time or in turn. Results have the same bits for every count and every order.
struct Threads {
  int count = 1;
  std::function<void(int n, const std::function<void(int)>& body)> run;
};

// The kernels as compiled for one instruction set.
struct Implementation {
  const char* name;
  void (*chunk_kda_fwd)(const Problem&, const Threads&);
  void (*recurrent_kda_fwd)(const Problem&, const Pool&, const Threads&);
};

// What this machine can run, fastest first; never empty.
const std::vector<Implementation>& implementations();

}  // namespace flashkda::cpu
