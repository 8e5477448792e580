// The scheduler of the emulation: the blocks of a launch one after the other, the threads of a block as fibers.
//
// A thread that meets no barrier never becomes a fiber of its own: the fiber that ran one thread to its end goes on
// with the next. Only when a thread has to wait does another fiber take over.
#pragma once

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"
#include "shared_memory.h"

namespace cnx {
namespace emulation {

enum class Order { forward, reverse, shuffle };

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Group {  // lanes in one warp operation
  Site site;
  Finish finish;
  unsigned mask, arrived;
};

struct Warp {
  unsigned lanes, ready, done, at_barrier;
  int group_count;
  Group group[32];
  uint64_t left[32], received[32];
  unsigned source[32];
};

inline std::string text(const char* name, const uint3& i) {
  return std::string(name) + " (" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
inline std::string text(const char* name, const Extent& e) {
  return std::string(name) + " " + std::to_string(e.x) + " x " + std::to_string(e.y) + " x " + std::to_string(e.z);
}
inline std::string text(const Site& site) {
  return std::string(site.operation) + " at " + site.file + ":" + std::to_string(site.line);
}

inline bool same(const Site& a, const Site& b) {
  return a.line == b.line && (a.operation == b.operation || !std::strcmp(a.operation, b.operation)) &&
         (a.file == b.file || !std::strcmp(a.file, b.file));
}

inline unsigned lowest(unsigned bits) {
  return static_cast<unsigned>(__builtin_ctz(bits));
}
inline unsigned highest(unsigned bits) {
  return 31 - static_cast<unsigned>(__builtin_clz(bits));
}

class Scheduler {
 public:
  static Scheduler*& active() {
    static __thread Scheduler* scheduler = nullptr;
    return scheduler;
  }

  static Scheduler& of_this_thread() {
    static thread_local std::unique_ptr<Scheduler> scheduler(new Scheduler);
    return *(active() = scheduler.get());
  }

  void launch(const char* name, const Extent& grid, const Extent& block, int64_t shared, void (*body)(const void*),
              const void* context);

  std::string place() const {
    return "convnextv2_kernels emulation: kernel " + name_ + ", " + text("block", grid_.block_index) + ", " +
           text("thread", current->index) + ": ";
  }

  Votes block_barrier(const Site& site, bool vote);
  uint64_t warp_operation(const Site& site, unsigned mask, uint64_t value, unsigned source, Finish finish);
  void yield();

  // The life of a fiber: threads that have not started, one after the other.
  void work();

 private:
  Scheduler() : threads_(1024), warps_(32) {}

  static constexpr int64_t kPatience = 1000000;  // yields without any other event in the block

  static uint3 make_index(unsigned x, unsigned y, unsigned z) {
    uint3 i;
    i.x = x, i.y = y, i.z = z;
    return i;
  }
  static unsigned all(unsigned n) { return n >= 32 ? ~0u : (1u << n) - 1; }
  static uint64_t greatest_common_divisor(uint64_t a, uint64_t b) {
    while (b) {
      const uint64_t c = a % b;
      a = b;
      b = c;
    }
    return a;
  }

  void choose_order();

  uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ >> 11;
  }

  unsigned first_warp() const { return order_ == Order::reverse ? warp_count_ - 1 : 0; }

  void run_block();

  // The next thread to run, taken from the ready ones: a warp goes on as long as it can.
  Thread* pick() {
    if (!ready_warps_) return nullptr;
    unsigned w = warp_, lane;
    if (order_ == Order::shuffle) {
      w = any(ready_warps_);
      lane = any(warps_[w].ready);
    } else if (order_ == Order::reverse) {
      if (!warps_[w].ready) w = highest(ready_warps_);
      lane = highest(warps_[w].ready);
    } else {
      if (!warps_[w].ready) w = lowest(ready_warps_);
      lane = lowest(warps_[w].ready);
    }
    warp_ = w;
    warps_[w].ready &= ~(1u << lane);
    if (!warps_[w].ready) ready_warps_ &= ~(1u << w);
    return &threads_[32 * w + lane];
  }

  unsigned any(unsigned bits) {
    unsigned skip = unsigned(random() % unsigned(__builtin_popcount(bits)));
    while (skip--) bits &= bits - 1;
    return lowest(bits);
  }

  void make_ready(unsigned warp, unsigned lane) {
    warps_[warp].ready |= 1u << lane;
    ready_warps_ |= 1u << warp;
  }

  // The running thread waits, or is ready again, and the next one runs.
  void suspend(const Site* site) {
    Thread* next = pick();
    if (!next) diverged(*site, "no thread of the block can go on: " + standing());
    idle_ = 0;
    resume(current, next);
  }

  void resume(Thread* self, Thread* next) {
    if (next == self) return;
    if (next->fiber) {
      change(next->fiber);
    } else {
      starting_ = next;
      change(idle_fiber());
    }
    current = self;
  }

  Fiber* idle_fiber() {
    if (idle_fibers_.empty()) {
      fibers_.emplace_back(new Fiber([] { active()->work(); }, fibers_.size()));
      idle_fibers_.push_back(fibers_.back().get());
    }
    Fiber* fiber = idle_fibers_.back();
    idle_fibers_.pop_back();
    return fiber;
  }

  void change(Fiber* to) {
    previous_ = running_;
    running_ = to;
    previous_->switch_to(to);
  }

  // Of the running thread, which has returned; null when it was the last of the block.
  Thread* finish_thread();

  // `site`: where the running thread is instead, or null if it has exited.
  void check_not_awaited(const Warp& warp, unsigned bit, const Site* site) const;

  [[noreturn]] void diverged(const Site& site, const std::string& why) const {
    throw Failure(place() + "divergent " + text(site) + ": " + why);
  }

  // What the threads of the block wait for.
  std::string standing() const;

  std::string name_;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  Grid grid_{};
  DynamicShared shared_;
  StaticShared static_shared_;
  Order order_ = Order::forward;
  uint64_t random_ = 1;

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  unsigned thread_count_ = 0, warp_count_ = 0;
  unsigned ready_warps_ = 0, warp_ = 0;  // the warp that runs
  unsigned done_count_ = 0;
  int64_t idle_ = 0;

  Site barrier_{};  // valid when threads have arrived
  unsigned arrived_ = 0, votes_ = 0, phase_ = 0;
  unsigned result_[2] = {};  // of the last two barriers: no thread can be further behind

  Fiber host_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_fibers_;
  Fiber *running_ = nullptr, *previous_ = nullptr;
  Thread* starting_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace emulation
}  // namespace cnx
