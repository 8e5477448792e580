// The CUDA execution model for a host compiler, so that the kernels run, and are tested, without a GPU.
//
// Blocks of a grid run one after the other; the threads of a block are fibers that change at barriers and warp
// operations only. Device pointers are host pointers and every launch is synchronous. Only for tests, where it tells
// more than a GPU:
//   * A barrier or warp operation that not all of its threads reach, at the same place in the source, is an error that
//     names kernel, block and thread; so is a wait that cannot end, and what assert or an exception says in a kernel.
//   * Shared memory is NaN (0xFF bytes) before each block. Dynamic shared memory has exactly the size asked for, and
//     writing past it is an error (with AddressSanitizer, reading too).
//   * CNX_EMULATION_ORDER = forward (default), reverse or shuffle (with CNX_EMULATION_SEED): the order of blocks,
//     warps and the lanes of a warp. Results that depend on it lack a barrier.
//   * CNX_EMULATION_SMS (default 4): multiprocessors of the device; few, so that persistent kernels loop.
//   * Launches that a GPU would refuse are refused.
// Limits: a block cannot wait for another one; no atomics on floats; a float expression may be contracted differently
// from nvcc (-mfma -ffp-contract=fast comes closest); fast intrinsics are exact ones.
//
// Build: g++ -std=c++20 -x c++ -DCNX_EMULATION -Wno-unknown-pragmas, with the include path of the CUDA toolkit (headers
// only), and runtime.cpp linked into the same file as the kernels.
//
// Cost, roughly: 5 to 10 ns for a thread that does not wait, 70 to 100 ns for its first wait, 25 ns for each further
// barrier, 15 ns for a shuffle; three to four times that with AddressSanitizer.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "runtime.h"

#include "host_functions.h"
#include "intrinsics.h"
#include "warp_functions.h"

// The toolkit defines the others, as nothing.
#undef __shared__
#define __shared__ static thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#define threadIdx (::cnx::emulation::current->index)
#define blockIdx (::cnx::emulation::current->grid->block_index)
#define blockDim (::cnx::emulation::current->grid->block_dim)
#define gridDim (::cnx::emulation::current->grid->grid_dim)
#define warpSize 32

// Reaches the caller of the launch.
#undef assert
#define assert(condition) \
  ((condition) ? void() : ::cnx::emulation::fail("assertion failed: " #condition, __FILE__, __LINE__))
