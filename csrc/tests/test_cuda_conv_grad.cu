// The CUDA weight gradient of the depthwise convolution, run by the emulation, against a direct sum over a dense map in
// double. Buffers are exactly sized: under AddressSanitizer a read past a run of pixels is an error.
#include <cstdlib>
#include <cstring>

#include "../cuda/common/types.cuh"
#include "cnx/cuda.h"
#include "harness.h"

using namespace cnx;
using namespace test;

namespace {

template <class T>
constexpr DType kType = std::is_same<T, float>::value        ? DType::f32
                        : std::is_same<T, double>::value     ? DType::f64
                        : std::is_same<T, cuda::bf16>::value ? DType::bf16
                                                             : DType::f16;

enum class Mask { ragged, all, single, none };

struct Images {
  int images, rows, cols, side;
  std::vector<int> slot;  // [images * rows * cols], -1 hidden
  int slots = 0;

  Images(int n, int r, int c, int s, Mask mask, Random& random) : images(n), rows(r), cols(c), side(s) {
    slot.assign(static_cast<size_t>(n) * r * c, -1);
    for (size_t i = 0; i < slot.size(); ++i) {
      const bool visible = mask == Mask::all || (mask == Mask::single && i == slot.size() / 2) ||
                           (mask == Mask::ragged && random.uniform() > 0.1);
      if (visible) slot[i] = slots++;
    }
  }
  int at(int image, int r, int c) const {
    return r < 0 || r >= rows || c < 0 || c >= cols ? -1 : slot[(image * rows + r) * cols + c];
  }
  std::vector<int32_t> neighbours(int reach) const {
    std::vector<int32_t> table;
    for (int n = 0; n < images; ++n)
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols; ++c)
          if (at(n, r, c) >= 0)
            for (int dr = -reach; dr <= reach; ++dr)
              for (int dc = -reach; dc <= reach; ++dc) table.push_back(at(n, r + dr, c + dc));
    return table;
  }
  // Packed row of a pixel, or -1 when hidden or outside.
  int64_t row_of(int image, int y, int x) const {
    if (y < 0 || x < 0 || y >= rows * side || x >= cols * side) return -1;
    const int s = at(image, y / side, x / side);
    return s < 0 ? -1 : (int64_t{s} * side + y % side) * side + x % side;
  }
};

// Exactly sized, or one element past an aligned address.
template <class T>
struct Buffer {
  std::vector<T> storage;
  T* data;
  Buffer(int64_t size, bool misaligned, Random& random)
      : storage(size + misaligned), data(storage.data() + misaligned) {
    for (auto& v : storage) {
      if constexpr (std::is_floating_point<T>::value)
        v = T(random.uniform());
      else
        v = T(float(random.uniform()));
    }
  }
};

template <class T>
void test_shape(int images, int rows, int cols, int side, bool packed, Mask mask, int64_t channels, int size,
                bool misaligned = false, bool bias = true) {
  using A = Acc<T>;
  Random random(rows * 131 + cols * 17 + side * 7 + channels + size + static_cast<int>(mask));
  const Images map(images, rows, cols, packed ? side : 1, packed ? mask : Mask::all, random);
  const int64_t pixels = int64_t{map.slots} * map.side * map.side;
  const int radius = size / 2, taps = size * size;
  const auto table = map.neighbours((radius + side - 1) / side);
  const Buffer<T> x(pixels * channels, misaligned, random), grad(pixels * channels, misaligned, random);
  std::vector<double> dw(channels * taps), db(channels);
  for (int n = 0; n < images; ++n)
    for (int y = 0; y < rows * map.side; ++y)
      for (int c = 0; c < cols * map.side; ++c) {
        const int64_t o = map.row_of(n, y, c);
        if (o < 0) continue;
        for (int64_t k = 0; k < channels; ++k) db[k] += double(grad.data[o * channels + k]);
        for (int t = 0; t < taps; ++t) {
          const int64_t i = map.row_of(n, y + t / size - radius, c + t % size - radius);
          if (i < 0) continue;
          for (int64_t k = 0; k < channels; ++k)
            dw[k * taps + t] += double(grad.data[o * channels + k]) * double(x.data[i * channels + k]);
        }
      }

  std::vector<int32_t> empty(1);
  ConvWeightGrad p{};
  p.dtype = kType<T>;
  p.geometry =
      packed ? ConvGeometry{.maps = map.slots,
                            .height = side,
                            .width = side,
                            .channels = channels,
                            .kernel_size = size,
                            .neighbours = table.empty() ? empty.data() : table.data()}
             : ConvGeometry{.maps = images, .height = rows, .width = cols, .channels = channels, .kernel_size = size};
  const auto workspace = cuda::conv_weight_grad_workspace(p);  // from shapes alone
  p.x = x.data;
  p.grad = grad.data;
  std::vector<A> got_w[2], got_b[2];
  for (int i = 0; i < 2; ++i) {
    setenv("CNX_EMULATION_SMS", i ? "7" : "1", 1);
    std::vector<unsigned char> scratch(workspace + 256, 0xff);  // not a number; misuse past the end is an error
    got_w[i].assign(channels * taps, A(NAN));
    got_b[i].assign(channels, A(NAN));
    p.dweight = got_w[i].data();
    p.dbias = bias ? got_b[i].data() : nullptr;
    auto* aligned = scratch.data() + (scratch.size() - workspace) / 2 * 2;
    aligned -= reinterpret_cast<uintptr_t>(aligned) % 256;
    cuda::conv_weight_grad(p, {.workspace = aligned});
  }
  const double bound = std::is_same<T, double>::value ? 1e-13 : 1e-5;
  char what[160];
  std::snprintf(what, sizeof what, "dtype %d images %d grid %dx%d side %d %s mask %d C %d K %d misaligned %d",
                int(p.dtype), images, rows, cols, side, packed ? "packed" : "dense", int(mask), int(channels), size,
                misaligned);
  check(relative_error(got_w[0], dw) < bound, what, relative_error(got_w[0], dw));
  if (bias) check(relative_error(got_b[0], db) < bound, what, relative_error(got_b[0], db));
  check(std::memcmp(got_w[0].data(), got_w[1].data(), got_w[0].size() * sizeof(A)) == 0, "depends on the device");
  if (bias)
    check(std::memcmp(got_b[0].data(), got_b[1].data(), got_b[0].size() * sizeof(A)) == 0, "depends on the device");
}

template <class T>
void test_type() {
  for (int side : {8, 4, 2, 1, 16, 3})
    for (int64_t channels : {1, 5, 17, 40, 96, 130})
      test_shape<T>(2, 3, side == 16 ? 2 : 4, side, true, Mask::ragged, channels, 7);
  for (int side : {8, 4, 2, 1}) {
    test_shape<T>(1, 7, 7, side, true, Mask::ragged, 6, 7);
    test_shape<T>(2, 2, 3, side, true, Mask::all, 66, 7, false, false);
    test_shape<T>(2, 2, 3, side, true, Mask::single, 24, 7);
    test_shape<T>(2, 2, 3, side, true, Mask::none, 10, 7);
    test_shape<T>(1, 2, 3, side, true, Mask::ragged, 40, 7, true);
    for (int size : {3, 5, 9, 11}) test_shape<T>(1, 3, 4, side, true, Mask::ragged, 10, size);
  }
  const int maps[][2] = {{1, 5}, {7, 7}, {14, 9}, {28, 30}, {8, 16}, {3, 1}};
  for (const auto& m : maps) {
    for (int64_t channels : {1, 10, 48}) test_shape<T>(2, m[0], m[1], 1, false, Mask::all, channels, 7);
    for (int size : {3, 11}) test_shape<T>(1, m[0], m[1], 1, false, Mask::all, 12, size);
  }
  test_shape<T>(1, 7, 7, 1, false, Mask::all, 32, 7, true);
  test_shape<T>(0, 7, 7, 1, false, Mask::all, 32, 7);
}

}  // namespace

int main() {
  test_type<cuda::bf16>();
  std::printf("bfloat16 done\n");
  test_type<cuda::f16>();
  std::printf("float16 done\n");
  test_type<float>();
  std::printf("float32 done\n");
  test_type<double>();
  std::printf("float64 done\n");
  // enough of everything that a warp takes several tiles and there are several splits
  test_shape<cuda::bf16>(12, 7, 7, 8, true, Mask::ragged, 112, 7);
  test_shape<cuda::bf16>(40, 7, 7, 1, true, Mask::ragged, 80, 7);
  return exit_code();
}
