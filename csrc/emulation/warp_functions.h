// Device functions: barriers of a block and operations of a warp.
#pragma once

#include "runtime.h"

#define CNX_SITE_PARAMETERS const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CNX_SITE(operation) (::cnx::emulation::Site{operation, file, line})

// Barriers of a block.

inline void __syncthreads(CNX_SITE_PARAMETERS) {
  ::cnx::emulation::block_barrier(CNX_SITE("__syncthreads"), false);
}
inline int __syncthreads_count(int predicate, CNX_SITE_PARAMETERS) {
  return static_cast<int>(::cnx::emulation::block_barrier(CNX_SITE("__syncthreads_count"), predicate != 0).count);
}
inline int __syncthreads_or(int predicate, CNX_SITE_PARAMETERS) {
  return ::cnx::emulation::block_barrier(CNX_SITE("__syncthreads_or"), predicate != 0).count != 0;
}
inline int __syncthreads_and(int predicate, CNX_SITE_PARAMETERS) {
  const auto votes = ::cnx::emulation::block_barrier(CNX_SITE("__syncthreads_and"), predicate != 0);
  return votes.count == votes.threads;
}

// Warp operations.

namespace cnx {
namespace emulation {

inline unsigned lane() {
  return current->linear % 32;
}

inline void finish_shuffle(const uint64_t* left, const unsigned* source, unsigned mask, uint64_t* received) {
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    const unsigned to = static_cast<unsigned>(__builtin_ctz(rest));
    received[to] = left[source[to]];
  }
}

// Other lanes may not have taken yet what they received.
inline void give_all(uint64_t value, unsigned mask, uint64_t* received) {
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) received[i] = value;
}

inline void finish_ballot(const uint64_t* left, const unsigned*, unsigned mask, uint64_t* received) {
  uint64_t votes = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1 && left[i]) votes |= uint64_t{1} << i;
  give_all(votes, mask, received);
}

inline void finish_sync(const uint64_t*, const unsigned*, unsigned, uint64_t*) {}

template <class T, class Combine>
void finish_reduce(const uint64_t* left, const unsigned*, unsigned mask, uint64_t* received) {
  unsigned rest = mask;
  T total = from_bits<T>(left[__builtin_ctz(rest)]);
  while (rest &= rest - 1) total = Combine()(total, from_bits<T>(left[__builtin_ctz(rest)]));
  give_all(to_bits(total), mask, received);
}

inline unsigned segment_end(unsigned width, const Site& site) {
  if (width == 0 || width > 32 || (width & (width - 1))) fail("width is not a power of two", site.file, site.line);
  return lane() | (width - 1);
}

template <class T>
T shuffle(const Site& site, unsigned mask, T value, unsigned source) {
  return from_bits<T>(warp_operation(site, mask, to_bits(value), source, finish_shuffle));
}

}  // namespace emulation
}  // namespace cnx

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CNX_SITE_PARAMETERS) {
  const auto site = CNX_SITE("__shfl_sync");
  const unsigned w = static_cast<unsigned>(width), end = ::cnx::emulation::segment_end(w, site);
  return ::cnx::emulation::shuffle(site, mask, value, (end & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CNX_SITE_PARAMETERS) {
  const auto site = CNX_SITE("__shfl_up_sync");
  const unsigned w = static_cast<unsigned>(width), end = ::cnx::emulation::segment_end(w, site);
  const unsigned lane = ::cnx::emulation::lane(), begin = end & ~(w - 1);
  return ::cnx::emulation::shuffle(site, mask, value, delta <= lane - begin ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CNX_SITE_PARAMETERS) {
  const auto site = CNX_SITE("__shfl_down_sync");
  const unsigned end = ::cnx::emulation::segment_end(static_cast<unsigned>(width), site);
  const unsigned lane = ::cnx::emulation::lane();
  return ::cnx::emulation::shuffle(site, mask, value, delta <= end - lane ? lane + delta : lane);
}
// A lane may read earlier segments, not later ones.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CNX_SITE_PARAMETERS) {
  const auto site = CNX_SITE("__shfl_xor_sync");
  const unsigned end = ::cnx::emulation::segment_end(static_cast<unsigned>(width), site);
  const unsigned lane = ::cnx::emulation::lane(), source = lane ^ static_cast<unsigned>(lane_mask);
  return ::cnx::emulation::shuffle(site, mask, value, source <= end ? source : lane);
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CNX_SITE_PARAMETERS) {
  ::cnx::emulation::warp_operation(CNX_SITE("__syncwarp"), mask, 0, ::cnx::emulation::lane(),
                                   ::cnx::emulation::finish_sync);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CNX_SITE_PARAMETERS) {
  return static_cast<unsigned>(::cnx::emulation::warp_operation(
      CNX_SITE("__ballot_sync"), mask, predicate != 0, ::cnx::emulation::lane(), ::cnx::emulation::finish_ballot));
}
inline int __any_sync(unsigned mask, int predicate, CNX_SITE_PARAMETERS) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CNX_SITE_PARAMETERS) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}
// Not to be trusted: which lanes run together is the hardware's affair.
inline unsigned __activemask() {
  return 0xffffffffu;
}

#define CNX_WARP_REDUCTION(name, T, expression)                                                                   \
  inline T name(unsigned mask, T value, CNX_SITE_PARAMETERS) {                                                    \
    struct Combine {                                                                                              \
      T operator()(T a, T b) const { return expression; }                                                         \
    };                                                                                                            \
    return ::cnx::emulation::from_bits<T>(                                                                        \
        ::cnx::emulation::warp_operation(CNX_SITE(#name), mask, ::cnx::emulation::to_bits(value),                 \
                                         ::cnx::emulation::lane(), ::cnx::emulation::finish_reduce<T, Combine>)); \
  }
CNX_WARP_REDUCTION(__reduce_add_sync, unsigned, a + b)
CNX_WARP_REDUCTION(__reduce_min_sync, unsigned, a < b ? a : b)
CNX_WARP_REDUCTION(__reduce_max_sync, unsigned, a < b ? b : a)
CNX_WARP_REDUCTION(__reduce_and_sync, unsigned, a& b)
CNX_WARP_REDUCTION(__reduce_or_sync, unsigned, a | b)
CNX_WARP_REDUCTION(__reduce_xor_sync, unsigned, a ^ b)
CNX_WARP_REDUCTION(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
CNX_WARP_REDUCTION(__reduce_min_sync, int, a < b ? a : b)
CNX_WARP_REDUCTION(__reduce_max_sync, int, a < b ? b : a)
#undef CNX_WARP_REDUCTION
#undef CNX_SITE_PARAMETERS
#undef CNX_SITE
