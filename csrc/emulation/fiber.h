// A fiber: a stack of its own and the place where its execution stands.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(CNX_EMULATION_UCONTEXT)
#undef CNX_EMULATION_UCONTEXT
#define CNX_EMULATION_UCONTEXT 1
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cnx {
namespace emulation {

#if !CNX_EMULATION_UCONTEXT
// Pushes what the ABI says a function preserves, changes stacks, pops it.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}
#endif

struct Fiber {
  using Entry = void (*)();

  // Of the thread that launches: the stack there is.
  Fiber() = default;

  Fiber(Entry entry, size_t number) : entry_(entry) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    size_ = kStack;
    memory_ = static_cast<char*>(
        mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, page, PROT_NONE);  // an overflow is a fault
    mapped_ = size_ + page;
    bottom_ = memory_ + page;
    // Tops at the same offset of a page would all fall on the same few sets of the cache.
    colour_ = number % 32 * 128;
    reset();
  }

  ~Fiber() {
    if (!memory_) return;
    forget_poison();
    munmap(memory_, mapped_);
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Starts over at the entry; what was on the stack is abandoned.
  void reset() {
    forget_poison();
    fake_stack_ = nullptr;
#if CNX_EMULATION_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = size_ - colour_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry_, 0);
#else
    void** top = reinterpret_cast<void**>(bottom_ + size_ - colour_);
    *--top = nullptr;  // where a return address would be: the entry never returns
    *--top = reinterpret_cast<void*>(entry_);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#endif
  }

  // To be called first by an entry; `from` is the fiber that switched here.
  void started([[maybe_unused]] Fiber* from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, from->memory_ ? nullptr : &from->bottom_constant_,
                                    from->memory_ ? nullptr : &from->size_);
#endif
  }

  // Leaves this fiber, which runs, for another; returns when one switches back.
  void switch_to(Fiber* to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, to->memory_ ? to->bottom_ : to->bottom_constant_, to->size_);
#endif
#if CNX_EMULATION_UCONTEXT
    swapcontext(&context_, &to->context_);
#else
    switch_stacks(&stack_pointer_, to->stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  // Little is touched; sanitizers need much when they report.
  static constexpr size_t kStack = 256 * 1024;

  void forget_poison() {
#if defined(__SANITIZE_ADDRESS__)
    if (memory_) __asan_unpoison_memory_region(bottom_, size_);
#endif
  }

  Entry entry_ = nullptr;
  char* memory_ = nullptr;
  char* bottom_ = nullptr;
  const void* bottom_constant_ = nullptr;  // of the launching thread, told by the sanitizer
  size_t size_ = 0, mapped_ = 0, colour_ = 0;
  void* fake_stack_ = nullptr;
#if CNX_EMULATION_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace emulation
}  // namespace cnx
