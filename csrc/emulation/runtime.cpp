// The emulation of CUDA launches, barriers and warp operations; see cuda_emulation.h and scheduler.h.
#include "runtime.h"

#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "scheduler.h"

namespace cnx {
namespace emulation {

__thread Thread* current = nullptr;

void Scheduler::launch(const char* name, const Extent& grid, const Extent& block, int64_t shared,
                       void (*body)(const void*), const void* context) {
  name_ = name;
  body_ = body;
  context_ = context;
  grid_.grid_dim = dim3(unsigned(grid.x), unsigned(grid.y), unsigned(grid.z));
  grid_.block_dim = dim3(unsigned(block.x), unsigned(block.y), unsigned(block.z));
  choose_order();
  thread_count_ = unsigned(block.x * block.y * block.z);
  warp_count_ = (thread_count_ + 31) / 32;
  for (unsigned i = 0; i < thread_count_; ++i) {
    const unsigned x = grid_.block_dim.x, y = grid_.block_dim.y;
    threads_[i] = {make_index(i % x, i / x % y, i / x / y), i, &grid_, nullptr};
  }
  const uint64_t blocks = uint64_t(grid.x) * uint64_t(grid.y) * uint64_t(grid.z);
  const uint64_t offset = random() % blocks;
  uint64_t stride = random() % blocks;
  while (greatest_common_divisor(stride, blocks) != 1) stride = (stride + 1) % blocks;
  for (uint64_t i = 0; i < blocks; ++i) {
    uint64_t b = i;
    if (order_ == Order::reverse) b = blocks - 1 - i;
    if (order_ == Order::shuffle) b = uint64_t((static_cast<unsigned __int128>(stride) * i + offset) % blocks);
    const uint64_t x = uint64_t(grid.x), y = uint64_t(grid.y);
    grid_.block_index = make_index(unsigned(b % x), unsigned(b / x % y), unsigned(b / x / y));
    grid_.dynamic_shared = shared_.prepare(size_t(shared));
    static_shared_.poison();
    run_block();
    if (!shared_.intact())
      throw Failure("convnextv2_kernels emulation: kernel " + name_ + ", " + text("block", grid_.block_index) +
                    ": written past the " + std::to_string(shared) + " bytes of dynamic shared memory");
  }
}

Votes Scheduler::block_barrier(const Site& site, bool vote) {
  Warp& warp = warps_[current->linear / 32];
  const unsigned bit = 1u << current->linear % 32;
  if (done_count_) diverged(site, std::to_string(done_count_) + " threads of the block have exited");
  check_not_awaited(warp, bit, &site);
  if (arrived_ == 0) {
    barrier_ = site;
    votes_ = 0;
  } else if (!same(site, barrier_)) {
    diverged(site, std::to_string(arrived_) + " threads wait in " + text(barrier_));
  }
  votes_ += vote;
  const unsigned phase = phase_ & 1;
  if (++arrived_ == thread_count_) {
    arrived_ = 0;
    result_[phase] = votes_;
    ++phase_;
    for (unsigned w = 0; w < warp_count_; ++w) {
      warps_[w].ready = warps_[w].lanes;
      warps_[w].at_barrier = 0;
    }
    ready_warps_ = all(warp_count_);
    warp_ = first_warp();
  } else {
    warp.at_barrier |= bit;
  }
  suspend(&site);
  return {result_[phase], thread_count_};
}

uint64_t Scheduler::warp_operation(const Site& site, unsigned mask, uint64_t value, unsigned source, Finish finish) {
  const unsigned w = current->linear / 32, lane = current->linear % 32, bit = 1u << lane;
  Warp& warp = warps_[w];
  if (!(mask & bit)) fail(std::string(site.operation) + " by a lane that is not in its mask", site.file, site.line);
  if (!(mask >> source & 1))
    fail(std::string(site.operation) + " reads lane " + std::to_string(source) + ", which is not in its mask",
         site.file, site.line);
  if (mask & warp.done) diverged(site, "its mask has lanes that do not exist or have exited");
  if (mask & warp.at_barrier) diverged(site, "lanes of its mask wait in " + text(barrier_));
  warp.left[lane] = value;
  warp.source[lane] = source;
  int g = 0;
  while (g < warp.group_count && !(warp.group[g].mask & mask)) ++g;
  Group& group = warp.group[g];
  if (g == warp.group_count) {
    check_not_awaited(warp, bit, &site);
    ++warp.group_count;
    group = {site, finish, mask, 0};
  } else if (group.mask != mask || !same(group.site, site) || group.finish != finish) {
    diverged(site, "lanes of its mask wait in " + text(group.site) + " with mask " + std::to_string(group.mask));
  }
  group.arrived |= bit;
  if (group.arrived == mask) {
    finish(warp.left, warp.source, mask, warp.received);
    group = warp.group[--warp.group_count];
    warp.ready |= mask;
    ready_warps_ |= 1u << w;
  }
  suspend(&site);
  return warp.received[lane];
}

void Scheduler::work() {
  running_->started(previous_);
  for (;;) {
    Fiber* const self = running_;
    Thread* thread = starting_;
    Thread* next = nullptr;
    current = thread;
    thread->fiber = self;
    try {
      body_(context_);
      next = finish_thread();
    } catch (const Failure&) {
      error_ = std::current_exception();
    } catch (const std::exception& e) {
      error_ = std::make_exception_ptr(Failure(place() + e.what()));
    } catch (...) {
      error_ = std::make_exception_ptr(Failure(place() + "unknown exception"));
    }
    thread->fiber = nullptr;
    if (error_ || !next || next->fiber) {
      idle_fibers_.push_back(self);
      change(error_ || !next ? &host_ : next->fiber);
    } else {
      starting_ = next;
    }
  }
}

void Scheduler::run_block() {
  for (unsigned w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    warp.lanes = warp.ready = all(w + 1 < warp_count_ ? 32 : thread_count_ - 32 * w);
    warp.done = ~warp.lanes;
    warp.at_barrier = 0;
    warp.group_count = 0;
  }
  ready_warps_ = all(warp_count_);
  warp_ = first_warp();
  arrived_ = done_count_ = phase_ = 0;
  idle_ = 0;
  running_ = &host_;
  starting_ = pick();
  change(idle_fiber());
  current = nullptr;
  if (!error_) return;
  // Threads that had started and not ended are abandoned where they are.
  idle_fibers_.clear();
  for (auto& fiber : fibers_) {
    fiber->reset();
    idle_fibers_.push_back(fiber.get());
  }
  std::rethrow_exception(std::exchange(error_, nullptr));
}

Thread* Scheduler::finish_thread() {
  Warp& warp = warps_[current->linear / 32];
  const unsigned bit = 1u << current->linear % 32;
  if (arrived_) diverged(barrier_, std::to_string(arrived_) + " threads wait there, this one has exited");
  check_not_awaited(warp, bit, nullptr);
  warp.done |= bit;
  idle_ = 0;
  if (++done_count_ == thread_count_) return nullptr;
  Thread* next = pick();
  if (!next) fail("has exited and no thread of the block can go on: " + standing());
  return next;
}

std::string Scheduler::standing() const {
  std::string all_waits;
  if (arrived_) all_waits = std::to_string(arrived_) + " threads in " + text(barrier_) + "; ";
  for (unsigned w = 0; w < warp_count_; ++w)
    for (int g = 0; g < warps_[w].group_count && all_waits.size() < 1000; ++g)
      all_waits += "warp " + std::to_string(w) + ", lanes " + std::to_string(warps_[w].group[g].arrived) + " of " +
                   std::to_string(warps_[w].group[g].mask) + " in " + text(warps_[w].group[g].site) + "; ";
  return all_waits + std::to_string(done_count_) + " of " + std::to_string(thread_count_) + " have exited";
}

void Scheduler::choose_order() {
  const char* order = std::getenv("CNX_EMULATION_ORDER");
  const std::string name = order && *order ? order : "forward";
  if (name == "forward") {
    order_ = Order::forward;
  } else if (name == "reverse") {
    order_ = Order::reverse;
  } else if (name == "shuffle") {
    order_ = Order::shuffle;
  } else {
    throw Failure("CNX_EMULATION_ORDER is none of forward, reverse, shuffle: " + name);
  }
  random_ = uint64_t(environment("CNX_EMULATION_SEED", 1)) * 2654435761u + 88172645463325252ull;
}

void Scheduler::yield() {
  Thread* self = current;
  make_ready(self->linear / 32, self->linear % 32);
  if (++idle_ > kPatience) fail("waits for what no other thread of its block does");
  const Order order = std::exchange(order_, Order::shuffle);  // every thread has its turn
  Thread* next = pick();
  order_ = order;
  resume(self, next);
}

void Scheduler::check_not_awaited(const Warp& warp, unsigned bit, const Site* site) const {
  for (int g = 0; g < warp.group_count; ++g)
    if (warp.group[g].mask & bit)
      diverged(warp.group[g].site,
               "lanes wait there for this thread, which " + (site ? "is at " + text(*site) : "has exited"));
}

namespace {

std::mutex& allowed_mutex() {
  static std::mutex mutex;
  return mutex;
}
std::map<const void*, int64_t>& allowed_shared() {  // of all kernels: under null
  static std::map<const void*, int64_t> allowed;
  return allowed;
}

void check_launch(const char* name, const void* kernel, const Extent& grid, const Extent& block, int64_t shared) {
  int64_t allowed = kDefaultShared;
  {
    std::lock_guard<std::mutex> lock(allowed_mutex());
    const auto found = allowed_shared().find(kernel);
    if (found != allowed_shared().end() && found->second > allowed) allowed = found->second;
  }
  const auto within = [](const Extent& e, int64_t x, int64_t y, int64_t z) {
    return e.x > 0 && e.y > 0 && e.z > 0 && e.x <= x && e.y <= y && e.z <= z;
  };
  std::string why;
  if (!within(grid, 2147483647, 65535, 65535)) why = text("grid", grid);
  if (!within(block, 1024, 1024, 64) || block.x * block.y * block.z > 1024) why = text("block", block);
  if (shared < 0 || shared > allowed)
    why = std::to_string(shared) + " bytes of dynamic shared memory, " + std::to_string(allowed) + " allowed";
  if (!why.empty())
    throw Failure(std::string("convnextv2_kernels: ") + name + ": invalid configuration argument: " + why);
}

}  // namespace

void launch(const char* name, const void* kernel, Extent grid, Extent block, int64_t shared_bytes,
            void (*body)(const void*), const void* context) {
  if (current) fail(std::string("launches ") + name + " from a kernel");
  check_launch(name, kernel, grid, block, shared_bytes);
  Scheduler::of_this_thread().launch(name, grid, block, shared_bytes, body, context);
}

void fail(const std::string& what, const char* file, int line) {
  std::string message = current ? Scheduler::active()->place() : std::string("convnextv2_kernels emulation: ");
  message += what;
  if (file) message += std::string(" at ") + file + ":" + std::to_string(line);
  throw Failure(message);
}

bool allow_shared(const void* kernel, int64_t bytes) {
  if (bytes < 0 || bytes > kMaximumShared) return false;
  std::lock_guard<std::mutex> lock(allowed_mutex());
  allowed_shared()[kernel] = bytes;
  int64_t& any = allowed_shared()[nullptr];
  if (bytes > any) any = bytes;
  return true;
}

int64_t environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::strtoll(value, nullptr, 10) : otherwise;
}

Votes block_barrier(const Site& site, bool vote) {
  return Scheduler::active()->block_barrier(site, vote);
}

uint64_t warp_operation(const Site& site, unsigned mask, uint64_t value, unsigned source, Finish finish) {
  return Scheduler::active()->warp_operation(site, mask, value, source, finish);
}

void yield() {
  Scheduler::active()->yield();
}

}  // namespace emulation
}  // namespace cnx
