// The same buffers and the same layout in every run, for programs that count instructions.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "../tests/harness.h"

namespace test {

struct Bfloat16 {
  uint16_t bits;
};

template <class T>
struct Element;
template <>
struct Element<float> {
  using Acc = float;
  static constexpr cnx::DType dtype = cnx::DType::f32;
  static constexpr const char* name = "float32";
};
template <>
struct Element<double> {
  using Acc = double;
  static constexpr cnx::DType dtype = cnx::DType::f64;
  static constexpr const char* name = "float64";
};
template <>
struct Element<Bfloat16> {
  using Acc = float;
  static constexpr cnx::DType dtype = cnx::DType::bf16;
  static constexpr const char* name = "bfloat16";
};

template <class T>
T rounded(double v) {
  return T(v);
}
template <>
inline Bfloat16 rounded<Bfloat16>(double v) {
  const float f = float(v);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return {uint16_t(bits >> 16)};
}

// Buffers on cache lines, so that no count depends on where the heap happens to be.
class Data {
 public:
  template <class T>
  T* draw(int64_t count, double shift = 0) {
    T* values = blank<T>(count);
    for (int64_t i = 0; i < count; ++i) values[i] = rounded<T>(shift + random_.uniform());
    return values;
  }
  template <class T>
  T* blank(int64_t count) {
    const size_t bytes = (sizeof(T) * size_t(count) + 63) / 64 * 64;
    buffers_.emplace_back(std::aligned_alloc(64, bytes), &std::free);
    if (!buffers_.back()) std::abort();
    std::memset(buffers_.back().get(), 0, bytes);
    return static_cast<T*>(buffers_.back().get());
  }
  const int32_t* indices(const std::vector<int32_t>& values) {
    return static_cast<int32_t*>(std::memcpy(blank<int32_t>(values.size()), values.data(), 4 * values.size()));
  }

 private:
  Random random_{7};
  std::vector<std::unique_ptr<void, decltype(&std::free)>> buffers_;
};

// Two images of 3x3 patches, six of nine visible.
constexpr int64_t kImages = 2, kSide = 3, kSlots = 12;
constexpr bool kVisible[kImages][kSide * kSide] = {{true, true, false, true, true, true, false, false, true},
                                                   {false, true, true, true, false, true, true, true, false}};

struct Layout {
  std::vector<int32_t> slot_of_patch, patch_of_slot, offsets = {0};

  Layout() {
    for (int n = 0; n < kImages; ++n) {
      for (int i = 0; i < kSide * kSide; ++i) {
        slot_of_patch.push_back(kVisible[n][i] ? int32_t(patch_of_slot.size()) : -1);
        if (kVisible[n][i]) patch_of_slot.push_back(int32_t(n * kSide * kSide + i));
      }
      offsets.push_back(int32_t(patch_of_slot.size()));
    }
  }
  std::vector<int32_t> neighbours(int reach) const {
    std::vector<int32_t> table;
    for (int32_t patch : patch_of_slot)
      for (int dr = -reach; dr <= reach; ++dr)
        for (int dc = -reach; dc <= reach; ++dc) {
          const int64_t image = patch / (kSide * kSide), r = patch / kSide % kSide + dr, c = patch % kSide + dc;
          const bool inside = r >= 0 && r < kSide && c >= 0 && c < kSide;
          table.push_back(inside ? slot_of_patch[(image * kSide + r) * kSide + c] : -1);
        }
    return table;
  }
};

}  // namespace test
