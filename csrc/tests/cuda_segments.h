// What the tests of the CUDA kernels on segments share: how rows fall into segments, and GRN's statistics in double.
#pragma once

#include "cuda_buffers.h"

namespace test {

struct Case {
  const char* name;
  std::vector<int32_t> offsets;  // ragged when not empty
  int64_t per_slot, count, rows;

  Segments segments() const {
    return {
        .offsets = offsets.empty() ? nullptr : offsets.data(), .rows_per_slot = per_slot, .count = count, .rows = rows};
  }
  int64_t owner(int64_t row) const {
    if (offsets.empty()) return row / (rows / count);
    int64_t s = 0;
    while (row >= (offsets[s + 1] - offsets[0]) * per_slot) ++s;
    return s;
  }
};

inline const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"three equal", {}, 1, 3, 3 * 21},
      {"one long", {}, 1, 1, 700},
      {"ragged", {3, 3, 8, 8, 30}, 13, 4, 27 * 13},
      {"rows 0", {}, 1, 2, 0},
      {"ragged rows 0", {5, 5, 5}, 4, 2, 0},
      {"no segments", {}, 1, 0, 0},
  };
  return all;
}

// What GRN is made of, in double.
struct Statistics {
  std::vector<double> norm, scale, kappa, dgamma;
};

template <class A>
Statistics statistics(int64_t count, int64_t channels, const std::vector<double>& squares, const std::vector<double>& t,
                      const Buffer<A>& gamma, double eps) {
  Statistics s{std::vector<double>(count * channels), std::vector<double>(count * channels),
               std::vector<double>(count * channels), std::vector<double>(channels)};
  for (int64_t n = 0; n < count; ++n) {
    double sum = 0, dot = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = n * channels + c;
      s.norm[i] = std::sqrt(squares[i]);
      sum += s.norm[i];
      dot += gamma[c] * t[i] * s.norm[i];
    }
    const double m = sum / channels + eps;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = n * channels + c;
      s.scale[i] = 1 + gamma[c] * s.norm[i] / m;
      s.kappa[i] = s.norm[i] > 0 ? (gamma[c] * t[i] / m - dot / (channels * m * m)) / s.norm[i] : 0;
      s.dgamma[c] += s.norm[i] / m * t[i];
    }
  }
  return s;
}

}  // namespace test
