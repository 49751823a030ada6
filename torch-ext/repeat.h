// Calls that are made again with other tensors, past torch's dispatcher: handing twenty arguments
// through it costs the host more than all else in a decode step.
#pragma once

#include <functional>

namespace flashkda {

// Where a call's tensors lie; null where absent. Their order is that of the arguments in Python.
struct Addresses {
  void* q = nullptr;
  void* k = nullptr;
  void* v = nullptr;
  void* g = nullptr;
  void* beta = nullptr;
  void* A_log = nullptr;
  void* dt_bias = nullptr;
  void* initial_state = nullptr;
  void* cu_seqlens = nullptr;
  void* state_indices = nullptr;
  void* num_accepted_tokens = nullptr;
  void* o = nullptr;
  void* final_state = nullptr;  // initial_state once more where that is written in place
};

// Makes a call again with tensors that differ from the first one's in nothing but their addresses
// and contents. Several threads may run it at once.
using Repeat = std::function<void(const Addresses&)>;

// Ops end with it: Python's latest_call() returns what this thread's latest op left here.
void remember(Repeat repeat);

}  // namespace flashkda
