// From a problem to tasks, and from tasks to threads. Defines the Implementation of one instruction
// set.
#pragma once

#include "chunk.h"
#include "recurrent.h"

namespace flashkda::cpu::FLASHKDA_CPU_ISA {

// Rounds denormals to zero while it lives: decayed values pass through them on the way to 0, and
// arithmetic on them is a hundred times slower. Only results below 1.2e-38 change.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  unsigned saved_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" : : "r"(saved_ | kFlushToZero));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  static constexpr uint64_t kFlushToZero = uint64_t{1} << 24;
  uint64_t saved_;
#endif
};

// Runs body(task, scratch) for every sequence, head and block of columns. Threads take the next
// task when they are done with one; a task's result depends on nothing but the task. Columns are
// divided only where there are fewer heads than threads, because every block repeats the work that
// does not depend on v.
template <class Scratch, class Body>
void for_each_task(const Problem& p, const Threads& threads, const Body& body) {
  const int64_t heads = p.N * p.HV;
  if (heads == 0) return;
  const int64_t tiles = (p.V + kTileCols - 1) / kTileCols;
  const int64_t blocks = std::clamp<int64_t>((threads.count + heads - 1) / heads, 1, tiles);
  const int64_t block_cols = (tiles + blocks - 1) / blocks * kTileCols;
  const int64_t tasks = heads * blocks;
  const int64_t count = std::min<int64_t>(threads.count, tasks);

  Arena measure;
  Scratch(measure, p.K, block_cols);
  const int64_t floats = round_up(measure.used, 1024);
  constexpr std::align_val_t kAlign{64};
  const std::unique_ptr<float, void (*)(float*)> memory(
      static_cast<float*>(::operator new(count * floats * sizeof(float), kAlign)),
      [](float* x) { ::operator delete(x, kAlign); });

  std::atomic<int64_t> next{0};
  threads.run(static_cast<int>(count), [&](int thread) {
    const FlushDenormals flush;
    Arena arena{memory.get() + thread * floats, 0};
    const Scratch scratch(arena, p.K, block_cols);
    for (int64_t i = next++; i < tasks; i = next++) {
      Task task;
      task.n = i / (p.HV * blocks);
      task.h = i / blocks % p.HV;
      task.v0 = i % blocks * block_cols;
      task.v1 = std::min(task.v0 + block_cols, p.V);
      if (task.v0 >= p.V) continue;
      const Span span = token_span(p, task.n);
      task.b = p.cu_seqlens.data ? 0 : task.n;
      task.begin = span.begin;
      task.end = span.end;
      body(task, scratch);
    }
  });
}

inline void chunk_kda_fwd(const Problem& p, const Threads& threads) {
  for_each_task<ChunkScratch>(
      p, threads, [&](const Task& task, const ChunkScratch& s) { chunk_task(p, task, s); });
}

inline void recurrent_kda_fwd(const Problem& p, const Pool& pool, const Threads& threads) {
  for_each_task<RecurrentScratch>(p, threads, [&](const Task& task, const RecurrentScratch& s) {
    recurrent_task(p, pool, task, s);
  });
}

extern const Implementation kImplementation = {FLASHKDA_CPU_NAME, chunk_kda_fwd, recurrent_kda_fwd};

}  // namespace flashkda::cpu::FLASHKDA_CPU_ISA
