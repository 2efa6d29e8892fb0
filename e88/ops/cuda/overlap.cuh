// What the kernels of a decoding step share: each lets the next one begin at once, fetches what does not depend on the one
// before, and only then waits for it. Without the launch attribute for that, neither call does anything.
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define DEVICE __device__ __forceinline__

DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// After it, all that earlier kernels wrote can be read.
DEVICE void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
