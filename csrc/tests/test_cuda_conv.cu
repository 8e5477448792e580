// The CUDA depthwise convolution, run by the emulation, against a direct sum over a dense map in double: every kernel
// that can serve a shape, every type, with bias, residual, turned taps and LN. Buffers are exactly sized and outputs
// begin as NaN, so that under AddressSanitizer a read or write outside is an error, and a pixel left out is one anyway.
#include <algorithm>
#include <cstring>
#include <set>
#include <string>

#include "../cuda/conv/warp.cuh"
#include "harness.h"

using namespace cnx;
using namespace cnx::cuda;
using test::check;
using test::Random;

namespace {

std::set<std::string> used;

template <class T>
struct Info;
template <>
struct Info<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr double bound = 4e-6;
  static const char* name() { return "f32"; }
};
template <>
struct Info<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr double bound = 1e-13;
  static const char* name() { return "f64"; }
};
template <>
struct Info<bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr double bound = 1.0 / 256;  // twice the rounding of the result
  static const char* name() { return "bf16"; }
};
template <>
struct Info<f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr double bound = 1.0 / 2048;
  static const char* name() { return "f16"; }
};

double value(double v) {
  return v;
}
double value(float v) {
  return v;
}
double value(bf16 v) {
  return __bfloat162float(v);
}
double value(f16 v) {
  return __half2float(v);
}
template <class T>
T rounded(double v) {
  return from_acc<T>(static_cast<Acc<T>>(v));
}

// `count` elements that begin `shift` elements after an aligned address and end with their allocation.
template <class T>
class Buffer {
 public:
  Buffer(int64_t count, int shift = 0)
      : shift_(shift), bytes_(std::max<size_t>(1, (count + shift) * sizeof(T))), count_(count) {
    std::memset(bytes_.data(), 0xff, bytes_.size());  // NaN in every type
  }
  Buffer(int64_t count, int shift, Random& random) : Buffer(count, shift) {
    for (int64_t i = 0; i < count; ++i) data()[i] = rounded<T>(random.uniform());
  }
  T* data() { return reinterpret_cast<T*>(bytes_.data()) + shift_; }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  int shift_;
  std::vector<unsigned char> bytes_;
  int64_t count_;
};

// A map of rows x cols pixels, dense, or as packed patches of which some are hidden.
struct Map {
  int images, rows, cols, side;  // side 0: dense
  std::vector<int> slot;
  int slots = 0;
  std::vector<int32_t> table;

  // visible: share of the patches; 0: none
  Map(int n, int grid_h, int grid_w, int s, double visible, int radius, Random& random)
      : images(n), rows(grid_h * (s ? s : 1)), cols(grid_w * (s ? s : 1)), side(s) {
    if (!s) return;
    slot.assign(n * grid_h * grid_w, -1);
    for (auto& v : slot)
      if (random.uniform() * 0.5 + 0.5 < visible) v = slots++;
    const int reach = (radius + s - 1) / s;
    for (int i = 0; i < n; ++i)
      for (int r = 0; r < grid_h; ++r)
        for (int c = 0; c < grid_w; ++c) {
          if (slot[(i * grid_h + r) * grid_w + c] < 0) continue;
          for (int dr = -reach; dr <= reach; ++dr)
            for (int dc = -reach; dc <= reach; ++dc) {
              const bool inside = r + dr >= 0 && r + dr < grid_h && c + dc >= 0 && c + dc < grid_w;
              table.push_back(inside ? slot[(i * grid_h + r + dr) * grid_w + c + dc] : -1);
            }
        }
  }
  int64_t pixels() const { return side ? int64_t{slots} * side * side : int64_t{images} * rows * cols; }
  int64_t row_of(int n, int y, int x) const {  // -1: outside or hidden
    if (y < 0 || x < 0 || y >= rows || x >= cols) return -1;
    if (!side) return (int64_t{n} * rows + y) * cols + x;
    const int s = slot[(n * (rows / side) + y / side) * (cols / side) + x / side];
    return s < 0 ? -1 : (int64_t{s} * side + y % side) * side + x % side;
  }
  ConvGeometry geometry(int64_t channels, int kernel) const {
    if (!side) return {.maps = images, .height = rows, .width = cols, .channels = channels, .kernel_size = kernel};
    // an empty table still says that the map is packed
    static const int32_t none = 0;
    return {.maps = slots,
            .height = side,
            .width = side,
            .channels = channels,
            .kernel_size = kernel,
            .neighbours = table.empty() ? &none : table.data()};
  }
};

enum Options { kBias = 1, kResidual = 2, kFlip = 4, kNormalize = 8, kAffine = 16, kMisaligned = 32 };

template <class T>
void test_case(const Map& map, int64_t channels, int kernel, int options, Random& random) {
  using A = Acc<T>;
  const int taps = kernel * kernel, radius = kernel / 2;
  const int64_t pixels = map.pixels();
  const int shift = options & kMisaligned ? 1 : 0;
  const bool flip = options & kFlip, normalize = options & kNormalize;
  Buffer<T> x(pixels * channels, shift, random), residual(pixels * channels, shift, random),
      y(pixels * channels, shift);
  Buffer<A> weight(channels * taps, 0, random), bias(channels, 0, random), rstd(pixels), scale(channels, 0, random),
      offset(channels, 0, random);

  ConvForward p{};
  p.dtype = Info<T>::dtype;
  p.geometry = map.geometry(channels, kernel);
  p.x = x.data();
  p.weight = weight.data();
  p.bias = options & kBias ? bias.data() : nullptr;
  p.residual = options & kResidual ? residual.data() : nullptr;
  p.flip = flip;
  p.y = y.data();
  p.normalize = normalize;
  p.ln_weight = options & kAffine ? scale.data() : nullptr;
  p.ln_bias = options & kAffine ? offset.data() : nullptr;
  p.eps = 1e-6;
  p.rstd = rstd.data();
  Buffer<unsigned char> workspace(conv_forward_workspace(p));
  used.insert(std::string(conv_forward_choice(p)) + (normalize && conv_forward_plan(p).fused ? " + LN" : ""));
  conv_forward(p, {.workspace = workspace.data()});

  double error = 0, size = 1e-30, rstd_error = 0;
  std::vector<double> row(channels);
  for (int n = 0; n < map.images; ++n)
    for (int py = 0; py < map.rows; ++py)
      for (int px = 0; px < map.cols; ++px) {
        const int64_t o = map.row_of(n, py, px);
        if (o < 0) continue;
        for (int64_t c = 0; c < channels; ++c) row[c] = options & kBias ? value(bias[c]) : 0;
        for (int t = 0; t < taps; ++t) {
          const int64_t i = map.row_of(n, py + t / kernel - radius, px + t % kernel - radius);
          if (i < 0) continue;
          for (int64_t c = 0; c < channels; ++c)
            row[c] += value(x[i * channels + c]) * value(weight[c * taps + (flip ? taps - 1 - t : t)]);
        }
        if (normalize) {
          double mean = 0, variance = 0;
          for (double v : row) mean += v / channels;
          for (double v : row) variance += (v - mean) * (v - mean) / channels;
          const double r = 1 / std::sqrt(variance + p.eps);
          for (int64_t c = 0; c < channels; ++c)
            row[c] = (row[c] - mean) * r * (options & kAffine ? value(scale[c]) : 1) +
                     (options & kAffine ? value(offset[c]) : 0);
          // one channel: the variance is nothing but rounding
          if (channels > 1) rstd_error = std::fmax(rstd_error, std::fabs(value(rstd[o]) - r) / r);
          if (std::isnan(value(rstd[o]))) rstd_error = INFINITY;
        } else if (options & kResidual) {
          for (int64_t c = 0; c < channels; ++c) row[c] += value(residual[o * channels + c]);
        }
        if (normalize && channels == 1) continue;
        for (int64_t c = 0; c < channels; ++c) {
          const double got = value(y[o * channels + c]);
          error = std::isnan(got) ? INFINITY : std::fmax(error, std::fabs(got - row[c]));
          size = std::fmax(size, std::fabs(row[c]));
        }
      }
  // few channels: a small deviation divides the rounding of the convolution
  const double slack = normalize ? (channels < 16 ? 400 : 4) : 1;
  char what[200];
  std::snprintf(what, sizeof what, "%s %s images %d map %dx%d side %d slots %d C %d K %d options %d",
                conv_forward_choice(p), Info<T>::name(), map.images, map.rows, map.cols, map.side, map.slots,
                static_cast<int>(channels), kernel, options);
  check(error / size <= Info<T>::bound * slack, what, error / size);
  check(rstd_error <= Info<T>::bound * slack, (std::string(what) + " rstd").c_str(), rstd_error);
}

const int kOptions[] = {0,
                        kBias,
                        kBias | kFlip | kResidual,
                        kBias | kNormalize,
                        kNormalize | kAffine | kBias,
                        kMisaligned | kBias | kResidual,
                        kMisaligned | kNormalize};

template <class T>
void test_map(const Map& map, int kernel, std::initializer_list<int64_t> widths, Random& random, bool all = true) {
  int turn = 0;
  for (int64_t channels : widths)
    for (int options : kOptions)
      if (all || ++turn % 3 == 0) test_case<T>(map, channels, kernel, options, random);
}

template <class T>
void test_type() {
  Random random(7);
  for (int side : {1, 2, 3, 4, 8, 16, 24}) {
    const bool small = side <= 4;
    const Map ragged(2, small ? 4 : 2, small ? 3 : 3, side, 0.5, 3, random), all(1, 2, 2, side, 2, 3, random),
        alone(1, 1, 1, side, 2, 3, random), none(2, 2, 2, side, 0, 3, random);
    if (side == 24) {
      test_map<T>(all, 7, {5, 40}, random, false);
      continue;
    }
    test_map<T>(ragged, 7, {1, 5, 17, 40, 96}, random, side < 8);
    test_map<T>(ragged, 7, {130}, random, false);
    if (side < 16) test_map<T>(ragged, 7, {48, 56, 80, 112, 160, 192, 352}, random, false);
    test_map<T>(all, 7, {40}, random);
    test_map<T>(alone, 7, {6}, random);
    test_map<T>(none, 7, {40}, random);
    for (int kernel : {3, 5, 9, 11}) {
      if (side == 16) break;
      const Map other(2, 3, 2, side, 0.6, kernel / 2, random);
      test_map<T>(other, kernel, {7, 40}, random, false);
    }
  }
  for (auto [h, w] : {std::pair{1, 5},
                      {7, 7},
                      {14, 9},
                      {28, 30},
                      {3, 1},
                      {5, 8},
                      {6, 10},
                      {4, 11},
                      {9, 17},
                      {3, 18},
                      {8, 26},
                      {10, 11},
                      {13, 14},
                      {7, 8}}) {
    const Map dense(2, h, w, 0, 1, 3, random);
    test_map<T>(dense, 7, {1, 17, 40, 96}, random, h * w < 60);
    for (int kernel : {3, 5, 9, 11})
      if (h * w < 100) test_map<T>(dense, kernel, {7, 40}, random, false);
  }
  const Map wide(1, 2, 2, 1, 2, 3, random), nothing(0, 7, 7, 0, 1, 3, random);
  test_map<T>(wide, 7, {700, 1100}, random);  // LN of more channels than a CTA holds
  test_map<T>(Map(1, 1, 1, 8, 2, 3, random), 7, {576}, random);
  test_map<T>(nothing, 7, {40}, random);
  // several units for each warp, and a last one beside none
  const Map many(3, 5, 5, 8, 0.6, 3, random);
  for (int64_t channels : {48, 96, 80})
    for (int options : {kBias | kFlip | kResidual, kNormalize | kAffine | kBias})
      test_case<T>(many, channels, 7, options, random);
  std::printf("%s: done\n", Info<T>::name());
}

}  // namespace

void test_divisor() {
  for (int64_t divisor : {1, 2, 3, 4, 5, 7, 12, 49, 641, 65536, 65537, 1000003, 2147479551, 2147479552})
    for (int64_t times : {int64_t{0}, int64_t{1}, int64_t{2}, int64_t{1000}, 0x7fffffff / divisor})
      for (int64_t n : {times * divisor - 1, times * divisor, times * divisor + 1})
        if (n >= 0 && n <= 0x7fffffff) check(Divisor::of(divisor)(n) == n / divisor, "divisor", double(divisor));
}

// Shapes that no one can allocate here.
void test_choice() {
  const auto choice = [](int64_t maps, int64_t height, int64_t width, int64_t channels) {
    ConvForward p{};
    p.dtype = DType::bf16;
    p.geometry = {.maps = maps, .height = height, .width = width, .channels = channels, .kernel_size = 7};
    return std::string(conv_forward_choice(p));
  };
  check(choice(1 << 16, 56, 56, 4096) == "conv_tile", "more than 2^32 elements");
  check(choice(1 << 20, 56, 56, 2) == "conv_generic", "more than 2^31 pixels");
  check(choice(1, 8, 1 << 20, 4096) == "conv_generic", "more than 2^31 bytes in a row");
}

int main(int count, char** names) {
  test_divisor();
  test_choice();
  const auto wanted = [&](const char* name) { return count < 2 || std::string(names[1]) == name; };
  if (wanted("f32")) test_type<float>();
  if (wanted("bf16")) test_type<bf16>();
  if (wanted("f16")) test_type<f16>();
  if (wanted("f64")) test_type<double>();
  for (const auto& name : used) std::printf("ran %s\n", name.c_str());
  return test::exit_code();
}
