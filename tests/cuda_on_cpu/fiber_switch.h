// How one OS thread leaves a stack for another, and what the sanitizers are told about it; for runtime.cpp.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(CUDA_ON_CPU_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_ON_CPU_TSAN)
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
static void acquire(void* object) { __tsan_acquire(object); }
static void release(void* object) { __tsan_release(object); }
#else
static void acquire(void*) {}
static void release(void*) {}
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on this stack, its pointer to *save, and continues where `to` was left.
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch,.-cuda_on_cpu_switch
)");
#endif
