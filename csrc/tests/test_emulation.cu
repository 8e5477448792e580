// The emulation of the CUDA execution model: that it computes what a GPU would, and that it finds what it is for.
#include "../cuda/common/types.cuh"
#include "cnx/cuda.h"
#include "harness.h"

#include <cstdlib>
#include <functional>
#include <limits>

using test::Random;

namespace cnx {
namespace cuda {
namespace {

constexpr unsigned kFull = 0xffffffffu;
const Launch launch{};

void expect(bool ok, const char* what, double value = 0) {
  test::check(ok, what, value);
}

template <class F>
void in_every_order(const F& f) {
  for (const char* order : {"forward", "reverse", "shuffle"}) {
    setenv("CNX_EMULATION_ORDER", order, 1);
    f(order);
  }
  unsetenv("CNX_EMULATION_ORDER");
}

// The launch must throw a std::runtime_error that has all the words.
void expect_error(const char* what, std::initializer_list<const char*> words, const std::function<void()>& f) {
  in_every_order([&](const char* order) {
    std::string message = "nothing";
    try {
      f();
    } catch (const std::runtime_error& e) {
      message = e.what();
    }
    bool found = true;
    for (const char* word : words) found = found && message.find(word) != std::string::npos;
    if (!found) std::printf("%s, %s: %s\n", what, order, message.c_str());
    expect(found, what);
  });
}

// --- computing

template <class T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(kFull, v, step);
  return v;
}

// Sums of blocks, each the sum of its warps' sums.
template <class T>
__global__ void __launch_bounds__(1024) block_sum(const T* __restrict__ x, int64_t n, T* out) {
  __shared__ T parts[32];
  T sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x)
    sum += __ldg(x + i);
  sum = warp_sum(sum);
  if (threadIdx.x % warpSize == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = warp_sum(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : T(0));
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

template <class T>
void test_block_sum() {
  Random random(3);
  std::vector<T> x;
  for (int i = 0; i < 5000; ++i) x.push_back(T(random.uniform() * 500 + 500));
  std::vector<T> first;
  for (int threads : {32, 96, 256, 1024}) {
    first.clear();
    in_every_order([&](const char*) {
      std::vector<T> out(3);
      CNX_LAUNCH((block_sum<T>), 3, threads, 0, launch, x.data(), int64_t(x.size()), out.data());
      double total = 0, expected = 0;
      for (T v : out) total += double(v);
      for (T v : x) expected += double(v);
      expect(std::fabs(total - expected) <= 1e-4 * std::fabs(expected) + 0.05, "block sum", total - expected);
      expect(first.empty() || std::memcmp(first.data(), out.data(), sizeof(T) * 3) == 0, "block sum: other order");
      first = out;
    });
  }
}

template <class T>
__global__ void shuffles(T* out, int amount, int width) {
  const T mine = T(float(threadIdx.x % 32 + 1));
  T* row = out + threadIdx.x * 4;
  row[0] = __shfl_sync(kFull, mine, amount, width);
  row[1] = __shfl_up_sync(kFull, mine, unsigned(amount), width);
  row[2] = __shfl_down_sync(kFull, mine, unsigned(amount), width);
  row[3] = __shfl_xor_sync(kFull, mine, amount, width);
}

template <class T>
void test_shuffles() {
  for (int width = 1; width <= 32; width *= 2)
    for (int amount = 0; amount < 32; ++amount) {
      std::vector<T> out(64 * 4);
      CNX_LAUNCH((shuffles<T>), 1, 64, 0, launch, out.data(), amount, width);
      for (int t = 0; t < 64; ++t) {
        const int lane = t % 32, segment = lane / width, x = lane ^ amount;
        const int expected[4] = {
            segment * width + amount % width, lane - amount >= segment * width ? lane - amount : lane,
            lane + amount < (segment + 1) * width ? lane + amount : lane, x / width <= segment ? x : lane};
        for (int k = 0; k < 4; ++k)
          expect(float(out[t * 4 + k]) == float(expected[k] + 1), "shuffle", t * 1000 + k * 100 + amount);
      }
    }
}

__global__ void votes(unsigned* out) {
  const unsigned t = threadIdx.x;
  unsigned* row = out + t * 12;
  row[0] = __ballot_sync(kFull, t % 3 == 0);
  row[1] = unsigned(__any_sync(kFull, t == 40));
  row[2] = unsigned(__all_sync(kFull, t != 40));
  row[3] = unsigned(__syncthreads_count(t % 3 == 0));
  row[4] = unsigned(__syncthreads_or(t == 63));
  row[5] = unsigned(__syncthreads_and(t != 63));
  row[6] = __reduce_add_sync(kFull, t);
  row[7] = unsigned(__reduce_max_sync(kFull, int(t) - 50));
  // Two halves of a warp, each for itself.
  row[8] = t % 32 < 16 ? __ballot_sync(0xffffu, t % 2) : 7;
  row[9] = t % 32 < 16 ? 7 : __ballot_sync(0xffff0000u, t % 2);
  row[10] = unsigned(__syncthreads_or(0));
  __syncwarp();
  row[11] = unsigned(__syncthreads_and(1));
}

void test_votes() {
  in_every_order([](const char*) {
    std::vector<unsigned> out(64 * 12);
    CNX_LAUNCH((votes), 1, 64, 0, launch, out.data());
    for (unsigned t = 0; t < 64; ++t) {
      const unsigned* row = out.data() + t * 12;
      unsigned ballot = 0, sum = 0;
      for (unsigned i = 0; i < 32; ++i) {
        ballot |= unsigned((t / 32 * 32 + i) % 3 == 0) << i;
        sum += t / 32 * 32 + i;
      }
      const unsigned expected[12] = {ballot,
                                     t / 32,
                                     1 - t / 32,
                                     22,
                                     1,
                                     0,
                                     sum,
                                     t < 32 ? -19u : 13u,
                                     t % 32 < 16 ? 0xaaaau : 7u,
                                     t % 32 < 16 ? 7u : 0xaaaa0000u,
                                     0,
                                     1};
      for (int k = 0; k < 12; ++k) expect(row[k] == expected[k], "vote", t * 100 + k);
    }
  });
}

__global__ void indices(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  __syncthreads();
  atomicAdd(out + i, int(i));
  __syncthreads();
}

void test_indices() {
  in_every_order([](const char*) {
    std::vector<int> out(2 * 3 * 5 * 8 * 4 * 3);
    CNX_LAUNCH((indices), dim3(2, 3, 5), dim3(8, 4, 3), 0, launch, out.data());
    for (size_t i = 0; i < out.size(); ++i) expect(out[i] == int(i), "index", double(i));
  });
}

__global__ void intrinsics() {
  assert(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __ffs(0) == 0 && __ffs(8) == 4 && __ffsll(1ll << 40) == 41);
  assert(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(1) == 63);
  assert(__brev(1) == 0x80000000u && __brev(0x12345678u) == 0x1e6a2c48u);
  assert(__byte_perm(0x33221100u, 0x77665544u, 0x7531) == 0x77553311u && __byte_perm(0x80, 0, 0x0008) == 0x808080ffu);
  assert(min(3, 4u) == 3u && max(2.0f, 3) == 3.0f && max(int64_t{1} << 40, 2) == int64_t{1} << 40);
  assert(min(NAN, 1.0f) == 1.0f && max(1.0, double(NAN)) == 1.0);
  assert(rsqrtf(4.0f) == 0.5f && rsqrt(16.0) == 0.25 && __fdividef(1, 4) == 0.25f && __frcp_rn(8) == 0.125f);
  assert(std::fabs(__expf(1.0f) - 2.7182817f) < 1e-6f && __fmaf_rn(2, 3, 4) == 10 && fmaf(2, 3, 4) == 10);
  assert(__float2int_rn(2.5f) == 2 && __float2int_rn(-3.5f) == -4 && __float2int_rz(-3.9f) == -3);
  assert(__float2int_rn(1e20f) == 2147483647 && __float2int_rn(NAN) == 0);
  assert(__int_as_float(0x3f800000) == 1.0f && __float_as_uint(-0.0f) == 0x80000000u);
  assert(erff(0) == 0 && tanhf(0) == 0 && __umulhi(0x80000000u, 4) == 2 && __mulhi(-1, 1) == -1);
}

// A producer and its consumers in one block.
__global__ void wait_for_flag(volatile int* flag) {
  if (threadIdx.x == 17) *flag = 1;
  while (!*flag) __nanosleep(100);
}

// --- conversions of bfloat16 and float16, against rounding done in double

struct Format {
  int bits, lowest_exponent, highest_exponent;  // explicit mantissa bits, of normal numbers
};

double rounded(double x, const Format& format) {
  if (x == 0 || std::isnan(x) || std::isinf(x)) return x;
  const int exponent = std::max(std::ilogb(x), format.lowest_exponent);
  const double unit = std::ldexp(1.0, exponent - format.bits);
  const double y = std::nearbyint(x / unit) * unit;  // to even; both operations are exact
  return std::fabs(y) >= std::ldexp(1.0, format.highest_exponent + 1) ? std::copysign(INFINITY, x) : y;
}

double decoded(uint16_t code, const Format& format) {
  const int exponent = (code & 0x7fff) >> format.bits, mantissa = code & ((1 << format.bits) - 1);
  const int all_ones = (1 << (15 - format.bits)) - 1;
  double y = exponent == 0
                 ? std::ldexp(mantissa, format.lowest_exponent - format.bits)
                 : std::ldexp((1 << format.bits) + mantissa, format.lowest_exponent - format.bits + exponent - 1);
  if (exponent == all_ones) y = mantissa ? double(NAN) : double(INFINITY);
  return code & 0x8000 ? -y : y;
}

bool equal(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

template <class T>
uint16_t code_of(T value) {
  uint16_t code;
  std::memcpy(&code, &value, 2);
  return code;
}

template <class T>
struct Pair;
template <>
struct Pair<bf16> {
  using type = __nv_bfloat162;
  static type pack(float2 v) { return __float22bfloat162_rn(v); }
  static type pack(float a, float b) { return __floats2bfloat162_rn(a, b); }
  static float2 unpack(type v) { return __bfloat1622float2(v); }
};
template <>
struct Pair<f16> {
  using type = __half2;
  static type pack(float2 v) { return __float22half2_rn(v); }
  static type pack(float a, float b) { return __floats2half2_rn(a, b); }
  static float2 unpack(type v) { return __half22float2(v); }
};

template <class T>
void test_conversions(const Format& format, const char* what) {
  const auto from_float = [&](float x) {
    const double expected = rounded(double(x), format);
    expect(equal(decoded(code_of(from_acc<T>(x)), format), expected), what, double(x));
    const auto pair = Pair<T>::pack(x, -x);
    expect(equal(decoded(code_of(pair.x), format), expected), what, double(x));
    expect(equal(decoded(code_of(pair.y), format), -expected), what, double(x));
    expect(equal(decoded(code_of(Pair<T>::pack(make_float2(1, x)).y), format), expected), what, double(x));
  };
  for (int code = 0; code < 65536; ++code) {
    T value;
    const uint16_t bits = uint16_t(code);
    std::memcpy(static_cast<void*>(&value), &bits, 2);
    const double exact = decoded(bits, format);
    expect(equal(double(to_acc(value)), exact), what, code);
    typename Pair<T>::type pair;
    pair.x = value, pair.y = T(1.0f);
    expect(equal(double(Pair<T>::unpack(pair).x), exact) && Pair<T>::unpack(pair).y == 1, what, code);
    if (!std::isfinite(exact)) continue;
    from_float(float(exact));
    // The tie with the next number, exactly and a bit to either side. Past the largest one is the tie with infinity.
    const double unit =
        std::ldexp(1.0, std::max(exact == 0 ? -1000 : std::ilogb(exact), format.lowest_exponent) - format.bits);
    const float tie = float(exact + unit / 2);
    expect(double(tie) == exact + unit / 2, "tie is a float", exact);
    for (float x : {tie, std::nextafterf(tie, -INFINITY), std::nextafterf(tie, INFINITY)}) from_float(x);
  }
  for (float x : {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1e-45f, std::numeric_limits<float>::max(), 65519.9f, 65520.0f})
    from_float(x);
  uint64_t state = 1;
  for (int i = 0; i < 200000; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    from_float(__uint_as_float(unsigned(state >> 32)));
  }
}

// --- mistakes that must be found

__global__ void barrier_in_branch() {
  if (threadIdx.x < 32) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void two_kinds() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads_or(1);
}
__global__ void shuffle_of_exited() {
  if (threadIdx.x % 32 == 5) return;
  __shfl_xor_sync(kFull, 1, 1);
}
__global__ void shuffle_and_barrier() {
  if (threadIdx.x % 32 == 5)
    __syncthreads();
  else
    __shfl_xor_sync(kFull, 1, 1);
}
__global__ void two_shuffles() {
  if (threadIdx.x % 2)
    __shfl_xor_sync(kFull, 1, 1);
  else
    __shfl_xor_sync(kFull, 1.0f, 1);
}
__global__ void overlapping_masks() {
  __shfl_xor_sync(threadIdx.x % 32 < 16 ? 0x1ffffu : 0xffff0000u, 1, 1);
}
__global__ void outside_mask(int step) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffu, 1, step);
}
__global__ void lane_outside_mask() {
  __syncwarp(0xffffu);
}
__global__ void spins(volatile int* flag) {
  while (!*flag) __nanosleep(100);
}
__global__ void asserts(int limit) {
  __syncthreads();
  assert(int(threadIdx.x) < limit);
  __syncthreads();
}
__global__ void throws() {
  __shfl_xor_sync(kFull, 1, 1);
  if (threadIdx.x == 3) throw std::logic_error("thrown");
  __syncthreads();
}
#if !defined(__SANITIZE_ADDRESS__)  // which would report it, and end
__global__ void overruns(int bytes) {
  CNX_DYNAMIC_SHARED(memory);
  if (threadIdx.x == 0) memory[bytes] = 1;
}
#endif

void test_mistakes() {
  expect_error("barrier in a branch", {"divergent __syncthreads", "barrier_in_branch", "block (", "thread ("},
               [&] { CNX_LAUNCH((barrier_in_branch), 2, 64, 0, launch); });
  expect_error("two barriers", {"divergent __syncthreads", "threads wait in __syncthreads"},
               [&] { CNX_LAUNCH((two_barriers), 1, 64, 0, launch); });
  expect_error("two kinds of barrier", {"divergent __syncthreads"}, [&] { CNX_LAUNCH((two_kinds), 1, 64, 0, launch); });
  expect_error("shuffle of an exited lane", {"divergent __shfl_xor_sync", "exited"},
               [&] { CNX_LAUNCH((shuffle_of_exited), 1, 64, 0, launch); });
  expect_error("shuffle in a block with half a warp", {"divergent __shfl_xor_sync", "do not exist"},
               [&] { CNX_LAUNCH((shuffle_of_exited), 1, 16, 0, launch); });
  expect_error("shuffle and barrier", {"divergent __shfl_xor_sync"},
               [&] { CNX_LAUNCH((shuffle_and_barrier), 1, 32, 0, launch); });
  expect_error("two shuffles", {"divergent __shfl_xor_sync"}, [&] { CNX_LAUNCH((two_shuffles), 1, 32, 0, launch); });
  expect_error("overlapping masks", {"divergent __shfl_xor_sync", "mask"},
               [&] { CNX_LAUNCH((overlapping_masks), 1, 32, 0, launch); });
  expect_error("source outside the mask", {"reads lane", "not in its mask"},
               [&] { CNX_LAUNCH((outside_mask), 1, 32, 0, launch, 16); });
  CNX_LAUNCH((outside_mask), 1, 32, 0, launch, 8);
  expect_error("lane outside its mask", {"not in its mask"},
               [&] { CNX_LAUNCH((lane_outside_mask), 1, 32, 0, launch); });
  int flag = 0;
  expect_error("deadlock", {"waits for", "spins"}, [&] { CNX_LAUNCH((spins), 1, 64, 0, launch, &flag); });
  expect_error("assertion", {"assertion failed", "threadIdx", "thread (50, 0, 0)"},
               [&] { CNX_LAUNCH((asserts), 1, 51, 0, launch, 50); });
  CNX_LAUNCH((asserts), 1, 51, 0, launch, 51);
  expect_error("exception", {"thrown", "throws", "thread (3, 0, 0)"}, [&] { CNX_LAUNCH((throws), 1, 64, 0, launch); });
#if !defined(__SANITIZE_ADDRESS__)
  for (int bytes : {0, 1, 100, 4096})
    expect_error("overrun", {"written past", "overruns"}, [&] { CNX_LAUNCH((overruns), 1, 32, bytes, launch, bytes); });
#endif
  expect_error("launch in a kernel", {"launches"},
               [&] { emulation::run("outer", 1, 1, 0, [&] { CNX_LAUNCH((intrinsics), 1, 1, 0, launch); }); });
}

__global__ void nothing() {}

void test_launch_limits() {
  const auto refused = [&](const char* what, emulation::Extent grid, emulation::Extent block, int64_t shared) {
    expect_error(what, {"invalid configuration argument", "nothing"},
                 [&] { CNX_LAUNCH((nothing), grid, block, shared, launch); });
  };
  refused("no block", 0, 32, 0);
  refused("negative grid", -1, 32, 0);
  refused("grid x", int64_t{1} << 31, 32, 0);
  refused("grid past 32 bits", (int64_t{1} << 32) + 1, 32, 0);
  refused("grid y", dim3(1, 65536), 32, 0);
  refused("grid z", dim3(1, 1, 65536), 32, 0);
  refused("no thread", 1, 0, 0);
  refused("1025 threads", 1, 1025, 0);
  refused("2048 threads", 1, dim3(32, 32, 2), 0);
  refused("block z", 1, dim3(1, 1, 65), 0);
  refused("48 KiB without leave", 1, 32, 48 * 1024 + 1);
  allow_shared(nothing, 100 * 1024);
  CNX_LAUNCH((nothing), 1, 1024, 100 * 1024, launch);
  refused("more than allowed", 1, 32, 100 * 1024 + 16);
  expect_error("227 KiB", {"shared memory limit"}, [] { allow_shared(nothing, 227 * 1024 + 1); });
  expect_error("leave of another kernel", {"invalid configuration"},
               [] { emulation::run("other", intrinsics, 1, 32, 64 * 1024, [] {}); });
  emulation::run("own", nothing, 1, 32, 64 * 1024, [] {});
  CNX_LAUNCH((nothing), dim3(1, 65535), 1, 48 * 1024, launch);
}

// --- order and memory

template <bool kBarrier>
__global__ void mirror(int* out) {
  __shared__ int values[128];
  values[threadIdx.x] = int(threadIdx.x);
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = values[127 - threadIdx.x];
}
template <bool kBarrier>
__global__ void mirror_warp(int* out) {
  __shared__ int values[128];
  values[threadIdx.x] = int(threadIdx.x);
  if (kBarrier) __syncwarp();
  out[threadIdx.x] = values[threadIdx.x ^ 31];
}
__global__ void chain(int* total) {
  *total = *total * 3 + int(blockIdx.x);
}

void test_order() {
  std::vector<std::vector<int>> with, without, warp_with, warp_without;
  std::vector<int> chained;
  in_every_order([&](const char*) {
    for (auto* results : {&with, &without, &warp_with, &warp_without}) results->emplace_back(128);
    CNX_LAUNCH((mirror<true>), 1, 128, 0, launch, with.back().data());
    CNX_LAUNCH((mirror<false>), 1, 128, 0, launch, without.back().data());
    CNX_LAUNCH((mirror_warp<true>), 1, 128, 0, launch, warp_with.back().data());
    CNX_LAUNCH((mirror_warp<false>), 1, 128, 0, launch, warp_without.back().data());
    int total = 1;
    CNX_LAUNCH((chain), 10, 1, 0, launch, &total);
    chained.push_back(total);
  });
  for (int i = 0; i < 128; ++i) expect(with[0][i] == 127 - i && warp_with[0][i] == (i ^ 31), "mirror", i);
  for (int o : {1, 2}) {
    expect(with[0] == with[o] && warp_with[0] == warp_with[o], "barrier: order seen", o);
    expect(without[0] != without[o], "missing __syncthreads not seen", o);
    expect(warp_without[0] != warp_without[o], "missing __syncwarp not seen", o);
    expect(chained[0] != chained[o], "dependence of blocks not seen", o);
  }
}

__global__ void poisoned(float* out) {
  __shared__ float fixed[40];
  __shared__ bf16 small[3];
  CNX_DYNAMIC_SHARED(memory);
  float* dynamic = reinterpret_cast<float*>(memory);
  float* row = out + (blockIdx.x * blockDim.x + threadIdx.x) * 3;
  row[0] = dynamic[threadIdx.x];
  row[1] = fixed[threadIdx.x];
  row[2] = to_acc(small[threadIdx.x % 3]);
  __syncthreads();
  dynamic[threadIdx.x] = fixed[threadIdx.x] = 1;
  small[threadIdx.x % 3] = from_acc<bf16>(1);
}

void test_poison() {
  in_every_order([&](const char*) {
    std::vector<float> out(3 * 40 * 3);
    CNX_LAUNCH((poisoned), 3, 40, 40 * sizeof(float), launch, out.data());
    for (size_t i = 0; i < out.size(); ++i) expect(std::isnan(out[i]), "shared memory is not poisoned", double(i));
  });
}

void test_threads() {
  const auto work = [] {
    for (int i = 0; i < 30; ++i) {
      test_block_sum<double>();
      bool thrown = false;
      try {
        CNX_LAUNCH((throws), 1, 64, 0, launch);
      } catch (const std::runtime_error&) {
        thrown = true;
      }
      expect(thrown, "exception in a thread");
    }
  };
  // The environment is not for several threads to change.
  const auto quiet = [] {
    const std::vector<float> x(4096, 1.0f);
    for (int i = 0; i < 50; ++i) {
      std::vector<float> out(4);
      CNX_LAUNCH((block_sum<float>), 4, 256, 0, launch, x.data(), int64_t{4096}, out.data());
      for (float v : out) expect(v == 1024, "two host threads", double(v));
    }
  };
  std::thread other(quiet);
  quiet();
  other.join();
  work();
}

void test_device() {
  expect(multiprocessors() == 4, "multiprocessors");
  setenv("CNX_EMULATION_SMS", "3", 1);
  expect(multiprocessors() == 3, "multiprocessors of the environment");
  expect(resident_blocks(nothing, 256, 0) == 6 && resident_blocks(nothing, 256, 200 << 10) == 3, "occupancy");
  unsetenv("CNX_EMULATION_SMS");
  int value = 0;
  check(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "attribute");
  expect(value == 227 * 1024, "shared memory of a block");
  std::vector<int> a(10, 1), b(10);
  check(cudaMemcpyAsync(b.data(), a.data(), 40, cudaMemcpyDeviceToDevice, nullptr), "copy");
  check(cudaMemsetAsync(a.data(), 0, 40, nullptr), "set");
  check(cudaGetLastError(), "last error");
  expect(a[9] == 0 && b[9] == 1, "copy and set");
  setenv("CNX_EMULATION_ORDER", "sideways", 1);
  bool thrown = false;
  try {
    CNX_LAUNCH((nothing), 1, 1, 0, launch);
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  unsetenv("CNX_EMULATION_ORDER");
  expect(thrown, "unknown order");
}

}  // namespace
}  // namespace cuda
}  // namespace cnx

int main() {
  using namespace cnx::cuda;
  test_block_sum<int>();
  test_block_sum<unsigned>();
  test_block_sum<long long>();
  test_block_sum<float>();
  test_block_sum<double>();
  test_shuffles<int>();
  test_shuffles<double>();
  test_shuffles<bf16>();
  test_shuffles<f16>();
  test_votes();
  test_indices();
  CNX_LAUNCH((intrinsics), 2, 3, 0, launch);
  in_every_order([&](const char*) {
    int flag = 0;
    CNX_LAUNCH((wait_for_flag), 1, 64, 0, launch, &flag);
  });
  test_conversions<bf16>({7, -126, 127}, "bfloat16");
  test_conversions<f16>({10, -14, 15}, "float16");
  test_mistakes();
  test_launch_limits();
  test_order();
  test_poison();
  test_threads();
  test_device();
  std::printf("%d failures\n", test::failures());
  return test::exit_code();
}
