// The convolution on tensor cores, run by the emulation, against a direct sum in double; and the emulated instructions
// against the products they stand for.
#include "../cuda/common/mma.cuh"
#include "../cuda/conv/mma_bands.cuh"
#include "cuda_buffers.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace cnx {
namespace cuda {
namespace {

// --- instructions: a whole matrix through shared memory, each element where the ISA says

template <bool kTransposed>
__global__ void load_kernel(const uint16_t* matrices, uint32_t* out) {
  __shared__ __align__(16) uint16_t rows[4][8][8];
  for (int i = threadIdx.x; i < 256; i += 32) (&rows[0][0][0])[i] = matrices[i];
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t to[4];
  if constexpr (kTransposed)
    load_matrices_transposed(to, rows[lane / 8][lane % 8]);
  else
    load_matrices(to, rows[lane / 8][lane % 8]);
  for (int m = 0; m < 4; ++m) out[m * 32 + lane] = to[m];
}

// a [16][depth], b [depth][8], d [16][8]: fragments taken element by element as the ISA's formulas have them.
template <class T, int kDepth>
__global__ void product_kernel(const T* a, const T* b, float* d) {
  const int lane = threadIdx.x, group = lane >> 2, member = lane & 3;
  uint32_t wa[kDepth / 4], wb[kDepth / 8];
  for (int i = 0; i < kDepth / 4; ++i) {
    T pair[2];
    for (int e = 0; e < 2; ++e) {
      const int index = 2 * i + e;  // a0, a1, ...
      const int row =
          kDepth == 8 ? (index < 2 ? group : group + 8) : (index < 2 || (index >= 4 && index < 6) ? group : group + 8);
      const int col = member * 2 + (index & 1) + (kDepth == 16 && index >= 4 ? 8 : 0);
      pair[e] = a[row * kDepth + col];
    }
    std::memcpy(&wa[i], pair, 4);
  }
  for (int i = 0; i < kDepth / 8; ++i) {
    T pair[2];
    for (int e = 0; e < 2; ++e) {
      const int index = 2 * i + e, row = member * 2 + (index & 1) + (index >= 2 ? 8 : 0);
      pair[e] = b[row * 8 + group];
    }
    std::memcpy(&wb[i], pair, 4);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)];
  multiply_add<T>(sum, wa, wb);
  for (int i = 0; i < 4; ++i) d[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = sum[i];
}

// As kernels use it: a by ldmatrix from rows, b by ldmatrix.trans from rows of [depth][8].
template <class T>
__global__ void loaded_product_kernel(const T* a, const T* b, float* d) {
  __shared__ __align__(16) T rows_a[16][16];
  __shared__ __align__(16) T rows_b[32][8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) (&rows_a[0][0])[i] = a[i], (&rows_b[0][0])[i] = b[i % 128];
  __syncwarp();
  uint32_t wa[4], wb[4];
  load_matrices(wa, &rows_a[lane % 16][lane / 16 * 8]);
  load_matrices_transposed(wb, rows_b[lane]);
  const uint32_t first[2] = {wb[0], wb[1]};
  float sum[4] = {};
  multiply_add<T>(sum, wa, first);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void misaligned_kernel(const unsigned char* bytes) {
  uint32_t to[4];
  load_matrices(to, bytes + 8);
}

}  // namespace
}  // namespace cuda
}  // namespace cnx

using namespace test;

namespace {

const Launch launch{};

void test_load() {
  std::vector<uint16_t> matrices(256);
  for (int i = 0; i < 256; ++i) matrices[i] = static_cast<uint16_t>(i * 257 + 3);
  for (const bool transposed : {false, true}) {
    std::vector<uint32_t> out(128);
    if (transposed)
      CNX_LAUNCH((cnx::cuda::load_kernel<true>), 1, 32, 0, launch, matrices.data(), out.data());
    else
      CNX_LAUNCH((cnx::cuda::load_kernel<false>), 1, 32, 0, launch, matrices.data(), out.data());
    bool same = true;
    for (int m = 0; m < 4; ++m)
      for (int row = 0; row < 8; ++row)
        for (int col = 0; col < 8; ++col) {
          // a lane has two neighbours of a row, or of a column
          const int lane = transposed ? col * 4 + row / 2 : row * 4 + col / 2, half = (transposed ? row : col) % 2;
          same = same && (out[m * 32 + lane] >> (16 * half) & 0xffff) == matrices[m * 64 + row * 8 + col];
        }
    check(same, transposed ? "ldmatrix.trans" : "ldmatrix");
  }
  alignas(16) unsigned char bytes[64] = {};
  bool refused = false;
  try {
    CNX_LAUNCH((cnx::cuda::misaligned_kernel), 1, 32, 0, launch, bytes);
  } catch (const std::runtime_error&) {
    refused = true;
  }
  check(refused, "ldmatrix of a misaligned row");
}

template <class T, int kDepth>
void test_product(Random& random) {
  Buffer<T> a(16 * kDepth), b(kDepth * 8);
  a.random(random);
  b.random(random);
  Buffer<float> d(16 * 8), loaded(16 * 8);
  d.random(random);
  std::vector<double> expected(128), product(128);
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c) {
      for (int k = 0; k < kDepth; ++k) product[r * 8 + c] += a[r * kDepth + k] * b[k * 8 + c];
      expected[r * 8 + c] = d[r * 8 + c] + product[r * 8 + c];
    }
  CNX_LAUNCH((cnx::cuda::product_kernel<T, kDepth>), 1, 32, 0, launch, a.data(), b.data(), d.data());
  compare(d, expected, 3e-7, "mma");
  if (kDepth == 8) return;
  CNX_LAUNCH((cnx::cuda::loaded_product_kernel<T>), 1, 32, 0, launch, a.data(), b.data(), loaded.data());
  compare(loaded, product, 3e-7, "mma of ldmatrix");
}

// --- the convolution

// Slots of an image's grid of patches, or a dense map (side 0), with the memory row of every pixel.
struct Map {
  int images, rows, cols, side, slots = 0;
  std::vector<int> slot;
  std::vector<int32_t> table;

  Map(int n, int grid_h, int grid_w, int s, double visible, Random& random)
      : images(n), rows(grid_h * (s ? s : 1)), cols(grid_w * (s ? s : 1)), side(s) {
    if (!s) return;
    slot.assign(n * grid_h * grid_w, -1);
    for (auto& v : slot)
      if (random.uniform() * 0.5 + 0.5 < visible) v = slots++;
    for (int i = 0; i < n; ++i)
      for (int r = 0; r < grid_h; ++r)
        for (int c = 0; c < grid_w; ++c) {
          if (slot[(i * grid_h + r) * grid_w + c] < 0) continue;
          for (int d = 0; d < 9; ++d) {
            const int y = r + d / 3 - 1, x = c + d % 3 - 1;
            const bool inside = y >= 0 && y < grid_h && x >= 0 && x < grid_w;
            table.push_back(inside ? slot[(i * grid_h + y) * grid_w + x] : -1);
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
  ConvGeometry geometry(int64_t channels) const {
    if (!side) return {.maps = images, .height = rows, .width = cols, .channels = channels, .kernel_size = 7};
    static const int32_t none = 0;
    return {.maps = slots,
            .height = side,
            .width = side,
            .channels = channels,
            .kernel_size = 7,
            .neighbours = table.empty() ? &none : table.data()};
  }
};

enum Options { kBias = 1, kResidual = 2, kFlip = 4, kNormalize = 8, kShifted = 16 };

// Elements in the middle of an allocation full of NaN, aligned to 16 bytes, or to 4 when shifted.
template <class T>
struct Gapped {
  std::vector<T> all;
  int64_t first, count;
  Gapped(int64_t n, bool shifted) : all(n + 128), first(0), count(n) {
    std::memset(static_cast<void*>(all.data()), 0xff, all.size() * sizeof(T));
    while (reinterpret_cast<uintptr_t>(&all[first]) % 16) ++first;
    first += 32 + (shifted ? 2 : 0);
  }
  T* data() { return all.data() + first; }
  double operator[](int64_t i) const { return value(all[first + i]); }
  bool gaps_untouched() const {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(all.data());
    for (size_t i = 0; i < all.size() * sizeof(T); ++i) {
      const bool inside = i >= first * sizeof(T) && i < (first + count) * sizeof(T);
      if (!inside && bytes[i] != 0xff) return false;
    }
    return true;
  }
};

template <class T>
void fill(Gapped<T>& to, Random& random, double size = 1) {
  for (int64_t i = 0; i < to.count; ++i) to.data()[i] = from_acc<T>(static_cast<Acc<T>>(random.uniform() * size));
}

template <class T>
void test_case(const Map& map, int64_t channels, int options, Random& random, double weight_size = 1) {
  const int64_t pixels = map.pixels();
  const bool shifted = options & kShifted, flip = options & kFlip, normalize = options & kNormalize;
  Gapped<T> x(pixels * channels, shifted), residual(pixels * channels, shifted), y(pixels * channels, shifted);
  Gapped<float> weight(channels * 49, false), bias(channels, false), rstd(pixels, false);
  fill(x, random);
  fill(residual, random);
  fill(weight, random, weight_size);
  fill(bias, random, weight_size);
  ConvForward p{};
  p.dtype = kDType<T>;
  p.geometry = map.geometry(channels);
  p.x = x.data();
  p.weight = weight.data();
  p.bias = options & kBias ? bias.data() : nullptr;
  p.residual = options & kResidual ? residual.data() : nullptr;
  p.flip = flip;
  p.y = y.data();
  p.normalize = normalize;
  p.eps = 1e-6;
  p.rstd = rstd.data();
  char what[160];
  std::snprintf(what, sizeof what, "%s images %d map %dx%d side %d slots %d C %d options %d",
                std::is_same<T, bf16>::value ? "bf16" : "f16", map.images, map.rows, map.cols, map.side, map.slots,
                static_cast<int>(channels), options);
  check(conv_mma_supports(p), (std::string(what) + " is served").c_str());
  conv_mma_forward(p, launch);

  double error = 0, size = 1e-30, inexact = 0;
  const int least = std::is_same<T, bf16>::value ? -126 : -14;  // smallest normal number
  std::vector<double> row(channels);
  for (int n = 0; n < map.images; ++n)
    for (int py = 0; py < map.rows; ++py)
      for (int px = 0; px < map.cols; ++px) {
        const int64_t o = map.row_of(n, py, px);
        if (o < 0) continue;
        for (int64_t c = 0; c < channels; ++c) row[c] = options & kBias ? bias[c] : 0;
        for (int t = 0; t < 49; ++t) {
          const int64_t i = map.row_of(n, py + t / 7 - 3, px + t % 7 - 3);
          if (i < 0) continue;
          for (int64_t c = 0; c < channels; ++c) row[c] += x[i * channels + c] * weight[c * 49 + (flip ? 48 - t : t)];
        }
        if (normalize) {
          double mean = 0, variance = 0;
          for (double v : row) mean += v / channels;
          for (double v : row) variance += (v - mean) * (v - mean) / channels;
          for (double& v : row) v = (v - mean) / std::sqrt(variance + p.eps);
        } else if (options & kResidual) {
          for (int64_t c = 0; c < channels; ++c) row[c] += residual[o * channels + c];
        }
        for (int64_t c = 0; c < channels; ++c) {
          const double got = y[o * channels + c];
          error = std::isnan(got) ? INFINITY : std::fmax(error, std::fabs(got - row[c]));
          size = std::fmax(size, std::fabs(row[c]));
          // half a step of the result; what is beyond it, float sums and the weights' lower halves must explain
          const double half_step = std::ldexp(std::is_same<T, bf16>::value ? 1.0 / 256 : 1.0 / 2048,
                                              std::max(std::ilogb(std::fmax(std::fabs(row[c]), 1e-30)), least));
          inexact = std::fmax(inexact, std::fabs(got - row[c]) - half_step);
        }
      }
  check(error / size <= (std::is_same<T, bf16>::value ? 1.0 / 256 : 1.0 / 2048) * (normalize ? 4 : 1), what,
        error / size);
  // a weight that was merely rounded would show
  const double slack = std::is_same<T, bf16>::value ? 1e-4 : 4e-6;
  if (!normalize)
    check(inexact <= slack * std::fmax(size, 1e-30), (std::string(what) + ": weights").c_str(), inexact / size);
  check(x.gaps_untouched() && y.gaps_untouched() && residual.gaps_untouched() && rstd.gaps_untouched(), what);
}

template <class T>
void test_type() {
  Random random(11);
  const Map ragged(3, 3, 3, 8, 0.45, random), alone(1, 1, 1, 8, 2, random), none(2, 2, 2, 8, 0, random),
      all(1, 3, 4, 8, 2, random), apart(9, 1, 1, 8, 2, random), large(2, 2, 2, 16, 0.6, random),
      dense(2, 16, 24, 0, 1, random), square(1, 8, 8, 0, 1, random);
  for (const Map* map : {&ragged, &alone, &none, &all, &apart, &large, &dense, &square})
    for (int options : {0, kBias | kResidual | kFlip}) test_case<T>(*map, 16, options, random);
  for (int64_t channels : {2, 40, 96, 130})
    for (int options : {0 | kBias, kFlip | kResidual, kShifted | kBias})
      test_case<T>(channels > 90 ? apart : ragged, channels, options, random);
  test_case<T>(ragged, 40, kShifted | kResidual, random);
  test_case<T>(ragged, 40, kBias | kNormalize, random);
  test_case<T>(ragged, 22, kBias | kNormalize | kShifted, random);
  test_case<T>(ragged, 16, kBias, random, 1e-4);  // float16: most lower halves would be zero
  test_case<T>(alone, 16, kBias, random, 100);
}

// Outputs of visible patches do not depend, bit for bit, on how many patches there are besides; not a number in x stays
// within three pixels of the patches that see it.
template <class T>
void test_isolation() {
  Random random(5);
  const int64_t channels = 24, per_patch = 64 * channels;
  const Map many(40, 1, 1, 8, 2, random), one(1, 1, 1, 8, 2, random);
  Gapped<T> x(40 * per_patch, false), y(40 * per_patch, false), single(per_patch, false);
  Gapped<float> weight(channels * 49, false);
  fill(x, random);
  fill(weight, random);
  std::memset(static_cast<void*>(x.data() + 7 * per_patch), 0xff, per_patch * sizeof(T));
  ConvForward p{};
  p.dtype = kDType<T>;
  p.geometry = many.geometry(channels);
  p.x = x.data();
  p.weight = weight.data();
  p.y = y.data();
  conv_mma_forward(p, launch);
  for (int patch = 0; patch < 40; ++patch) {
    if (patch == 7) continue;
    p.geometry = one.geometry(channels);
    p.x = x.data() + patch * per_patch;
    p.y = single.data();
    if (patch % 5 == 0 || patch == 6 || patch == 8) {
      conv_mma_forward(p, launch);
      check(std::memcmp(single.data(), y.data() + patch * per_patch, per_patch * sizeof(T)) == 0, "patch by itself");
    }
    for (int64_t i = 0; i < per_patch; ++i)
      if (std::isnan(y[patch * per_patch + i])) return check(false, "not a number of another patch");
  }
}

void test_supported_shapes() {
  Random random(3);
  const Map map(1, 2, 2, 8, 2, random);
  alignas(16) static unsigned char memory[64];
  const auto call = [&](auto change) {
    ConvForward p{};
    p.dtype = DType::bf16;
    p.geometry = map.geometry(32);
    p.x = p.y = memory;
    change(p);
    return conv_mma_supports(p);
  };
  check(call([](ConvForward&) {}), "served");
  check(!call([](ConvForward& p) { p.dtype = DType::f32; }), "float");
  check(!call([](ConvForward& p) { p.geometry.kernel_size = 5; }), "K 5");
  check(!call([](ConvForward& p) { p.geometry.channels = 33; }), "odd channels");
  check(!call([](ConvForward& p) { p.geometry.height = p.geometry.width = 4; }), "side 4");
  check(!call([](ConvForward& p) { p.x = memory + 2; }), "x misaligned");
  check(!call([](ConvForward& p) { p.y = memory + 2; }), "y misaligned");
  check(!call([](ConvForward& p) { p.residual = memory + 2; }), "residual misaligned");
  check(call([](ConvForward& p) { p.x = memory + 4; }), "words are enough");
}

}  // namespace

int main() {
  Random random(1);
  test_load();
  for (int i = 0; i < 5; ++i) {
    test_product<bf16, 16>(random);
    test_product<bf16, 8>(random);
    test_product<f16, 16>(random);
    test_product<f16, 8>(random);
  }
  test_supported_shapes();
  test_isolation<bf16>();
  test_isolation<f16>();
  test_type<bf16>();
  test_type<f16>();
  return exit_code();
}
