// One thin function per instruction that CUTLASS has no atom for. sm_80.
#pragma once

#include <cstdint>

namespace flashkda::cuda::ptx {

__device__ __forceinline__ uint32_t smem_address(const void* ptr) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(ptr));
}

// A generic pointer into shared memory, of which the compiler knows that it is one.
__device__ __forceinline__ void* shared_pointer(uint32_t address) {
  return __cvta_shared_to_generic(address);
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.shared.b64 state, [%0];\n"
      "}\n" ::"r"(smem_address(barrier))
      : "memory");
}

// Waits until the phase with this parity has completed. From Hopper on an instruction waits, for a
// while; before it a loop asks.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define FLASHKDA_ASK "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
#else
#define FLASHKDA_ASK "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
#endif
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n" FLASHKDA_ASK
      "@!done bra wait;\n"
      "}\n" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
#undef FLASHKDA_ASK
}

// The same for a warp in whose work there is time to spare: where a loop asks, it asks less often,
// which leaves issue slots to others.
__device__ __forceinline__ void mbarrier_wait_idle(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  mbarrier_wait(barrier, parity);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra end;\n"
      "nanosleep.u32 32;\n"
      "bra wait;\n"
      "end:\n"
      "}\n" ::"r"(smem_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// A named barrier of some of a block's warps.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The same; says whether the predicate held in any thread.
__device__ __forceinline__ bool barrier_any(int id, int threads, bool predicate) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.ne.s32 p, %1, 0;\n"
      "bar.red.or.pred q, %2, %3, p;\n"
      "selp.s32 %0, 1, 0, q;\n"
      "}\n"
      : "=r"(any)
      : "r"(static_cast<int>(predicate)), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

// Arrives once all cp.async that this thread has issued so far have landed.
__device__ __forceinline__ void cp_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(smem_address(barrier))
               : "memory");
}

// 16 bytes from global to shared memory; zeros where keep is false (nothing is read then).
__device__ __forceinline__ void cp_async_16(void* smem, const void* gmem, bool keep) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(smem)),
               "l"(gmem), "r"(keep ? 16 : 0)
               : "memory");
}

// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_streaming_16(const void* gmem) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(gmem)
               : "memory");
  return x;
}

// Flags in global memory, between blocks that are apart.
__device__ __forceinline__ void store_relaxed(unsigned* flag, unsigned value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void store_release(unsigned* flag, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_relaxed(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ unsigned load_acquire(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// Transposes the 8x8 matrix of 16-bit elements that a warp holds as row lane / 4, columns 2 (lane %
// 4) + {0, 1}.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// The same value, about which the compiler knows nothing: what is computed from it is not moved out
// of a loop.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ uint32_t opaque(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ int64_t opaque(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

template <class T>
__device__ __forceinline__ T* opaque(T* x) {
  asm volatile("" : "+l"(x));
  return x;
}

// The same of a lane's number, of which the compiler still knows the range.
__device__ __forceinline__ int opaque_lane(int lane) {
  lane = opaque(lane);
  __builtin_assume(lane >= 0 && lane < 32);
  return lane;
}

// From here on, a grid may start that was launched to run beside this one.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits for the grid that this one was launched to run beside, if there is one.
__device__ __forceinline__ void wait_for_dependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace flashkda::cuda::ptx
