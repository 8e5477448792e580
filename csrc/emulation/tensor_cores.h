// Tensor core instructions of a warp: ldmatrix and mma.sync for 16-bit elements with float accumulators, with the
// fragments of the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point type", "ldmatrix"). g = lane / 4,
// t = lane % 4:
//   ldmatrix  matrix m of 8 rows of 16 bytes, whose addresses lanes 8m..8m+7 hold. Register m of a lane: row g,
//   elements
//             2t and 2t+1; with .trans: column g, rows 2t and 2t+1.
//   A         registers 0..3: rows g, g+8, g, g+8; columns 2t and 2t+1, in registers 2 and 3 8 more (k8: 0 and 1 only)
//   B         registers 0, 1: rows 2t and 2t+1, in register 1 8 more; column g (k8: register 0 only)
//   C, D      registers 0..3: rows g, g, g+8, g+8; columns 2t, 2t+1, 2t, 2t+1
#pragma once

#include <cmath>

#include "warp_functions.h"

namespace cnx {
namespace emulation {

// What a lane gives to the operation; the last lane that arrives does the work of all.
struct LoadMatrix {
  const void* row;
  uint32_t* to;
};

struct MultiplyAdd {
  const uint32_t *a, *b;
  float* d;
};

inline uint16_t half_of(uint32_t word, int which) {
  return static_cast<uint16_t>(word >> (16 * which));
}

template <class Argument>
const Argument* given_by(const uint64_t* left, int lane) {
  return reinterpret_cast<const Argument*>(static_cast<uintptr_t>(left[lane]));
}

template <int kMatrices, bool kTransposed>
void finish_load_matrix(const uint64_t* left, const unsigned*, unsigned, uint64_t*) {
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) std::memcpy(matrix[row], given_by<LoadMatrix>(left, 8 * m + row)->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      given_by<LoadMatrix>(left, lane)->to[m] = low | high << 16;
    }
  }
}

// The tensor cores align the products and cut what does not fit; the sum is here exact but for its last step, which
// cuts as well.
inline float cut_to_float(double sum) {
  const float rounded = static_cast<float>(sum);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(sum) ? std::nextafterf(rounded, 0.0f) : rounded;
}

template <class T, int kDepth>
void finish_multiply_add(const uint64_t* left, const unsigned*, unsigned, uint64_t*) {
  const auto value = [](uint32_t word, int which) {
    return static_cast<double>(static_cast<float>(from_bits<T>(half_of(word, which))));
  };
  double a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* given = given_by<MultiplyAdd>(left, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kDepth / 4; ++i)
      for (int e = 0; e < 2; ++e) a[g + i % 2 * 8][2 * t + e + i / 2 * 8] = value(given->a[i], e);
    for (int i = 0; i < kDepth / 8; ++i)
      for (int e = 0; e < 2; ++e) b[2 * t + e + 8 * i][g] = value(given->b[i], e);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* given = given_by<MultiplyAdd>(left, lane);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = given->d[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      given->d[i] = cut_to_float(sum);
    }
  }
}

template <class Argument>
void tensor_operation(const char* name, const Argument& argument, Finish finish, const char* file, int line) {
  warp_operation(Site{name, file, line}, 0xffffffffu, static_cast<uint64_t>(reinterpret_cast<uintptr_t>(&argument)),
                 lane(), finish);
}

// The addresses of lanes 8 kMatrices and above are not looked at.
template <int kMatrices, bool kTransposed>
void load_matrix(uint32_t (&to)[kMatrices], const void* row, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "");
  if (lane() < 8 * kMatrices && reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: misaligned row", file, line);
  tensor_operation("ldmatrix", LoadMatrix{row, to}, finish_load_matrix<kMatrices, kTransposed>, file, line);
}

// d += a b, of 16 rows, 8 columns and 4 kWords of depth.
template <class T, int kWords>
void multiply_add(float (&d)[4], const uint32_t (&a)[kWords], const uint32_t (&b)[kWords / 2],
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(kWords == 2 || kWords == 4, "");
  tensor_operation("mma", MultiplyAdd{a, b, d}, finish_multiply_add<T, 4 * kWords>, file, line);
}

}  // namespace emulation
}  // namespace cnx
