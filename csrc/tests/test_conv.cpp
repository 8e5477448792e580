// The depthwise convolution of every instruction set against a direct sum over a dense map in double, on packed patches
// and on dense maps, with channel counts that end in partial vectors. Buffers are exactly sized: under AddressSanitizer
// a read past a run of pixels is an error.
#include "harness.h"

using namespace cnx;
using namespace test;

namespace {

struct Grid {
  int rows, cols, side;
  std::vector<int> slot;  // [rows * cols], -1 hidden
  int slots;

  Grid(int r, int c, int s, Random& random) : rows(r), cols(c), side(s), slot(r * c, -1), slots(0) {
    for (auto& value : slot)
      if (random.uniform() > 0) value = slots++;
  }
  std::vector<int32_t> neighbours(int reach) const {
    std::vector<int32_t> table;
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c) {
        if (slot[r * cols + c] < 0) continue;
        for (int dr = -reach; dr <= reach; ++dr)
          for (int dc = -reach; dc <= reach; ++dc) {
            const bool inside = r + dr >= 0 && r + dr < rows && c + dc >= 0 && c + dc < cols;
            table.push_back(inside ? slot[(r + dr) * cols + c + dc] : -1);
          }
      }
    return table;
  }
  // Packed row of dense pixel (y, x), or -1 when hidden or outside.
  int64_t row_of(int64_t y, int64_t x) const {
    if (y < 0 || x < 0 || y >= rows * side || x >= cols * side) return -1;
    const int s = slot[y / side * cols + x / side];
    return s < 0 ? -1 : (int64_t{s} * side + y % side) * side + x % side;
  }
};

template <class A>
void test_shape(const KernelTable& k, int rows, int cols, int side, int64_t channels, int kernel, bool packed) {
  Random random(rows * 131 + cols * 17 + side * 7 + channels + kernel);
  Grid grid(rows, cols, side, random);
  if (!packed)
    for (int i = 0; i < rows * cols; ++i) grid.slot[i] = i;  // side 1: a dense map of rows x cols pixels
  const int64_t pixels = packed ? int64_t{grid.slots} * side * side : rows * cols;
  const int radius = kernel / 2, reach = (radius + side - 1) / side, taps = kernel * kernel;
  const auto table = grid.neighbours(reach);
  const auto x = random.vector<A>(pixels * channels), grad = random.vector<A>(pixels * channels);
  const auto weight = random.vector<A>(channels * taps), bias = random.vector<A>(channels);
  std::vector<double> y(pixels * channels), dx(pixels * channels), dw(channels * taps), db(channels);
  for (int64_t py = 0; py < rows * side; ++py)
    for (int64_t px = 0; px < cols * side; ++px) {
      const int64_t o = grid.row_of(py, px);
      if (o < 0) continue;
      for (int64_t c = 0; c < channels; ++c) {
        y[o * channels + c] += bias[c];
        db[c] += grad[o * channels + c];
      }
      for (int t = 0; t < taps; ++t) {
        const int64_t i = grid.row_of(py + t / kernel - radius, px + t % kernel - radius);
        if (i < 0) continue;
        for (int64_t c = 0; c < channels; ++c) {
          y[o * channels + c] += double(x[i * channels + c]) * weight[c * taps + t];
          dx[i * channels + c] += double(grad[o * channels + c]) * weight[c * taps + t];
          dw[c * taps + t] += double(grad[o * channels + c]) * x[i * channels + c];
        }
      }
    }
  const double bound = sizeof(A) == 4 ? 3e-6 : 1e-13;
  const ConvGeometry g =
      packed ? ConvGeometry{.maps = grid.slots,
                            .height = side,
                            .width = side,
                            .channels = channels,
                            .kernel_size = kernel,
                            .neighbours = table.data()}
             : ConvGeometry{.maps = 1, .height = rows, .width = cols, .channels = channels, .kernel_size = kernel};
  std::vector<A> got(pixels * channels, A(NAN)), got_dx(pixels * channels, A(NAN));
  ConvForward p{};
  p.dtype = dtype_of<A>();
  p.geometry = g;
  p.x = x.data();
  p.weight = weight.data();
  p.bias = bias.data();
  p.y = got.data();
  k.conv_forward(p, two_threads());
  check(relative_error(got, y) < bound, "conv forward", relative_error(got, y));
  std::vector<A> residual = random.vector<A>(pixels * channels);
  for (size_t i = 0; i < dx.size(); ++i) dx[i] += residual[i];
  p.x = grad.data();
  p.bias = nullptr;
  p.residual = residual.data();
  p.flip = true;
  p.y = got_dx.data();
  k.conv_forward(p, two_threads());
  check(relative_error(got_dx, dx) < bound, "conv dx", relative_error(got_dx, dx));
  std::vector<A> got_dw(channels * taps, A(NAN)), got_db(channels, A(NAN)), again(channels * taps);
  ConvWeightGrad q{.dtype = dtype_of<A>(),
                   .geometry = g,
                   .x = x.data(),
                   .grad = grad.data(),
                   .dweight = got_dw.data(),
                   .dbias = got_db.data()};
  k.conv_weight_grad(q, two_threads());
  check(relative_error(got_dw, dw) < 4 * bound, "conv dw", relative_error(got_dw, dw));
  check(relative_error(got_db, db) < 4 * bound, "conv db", relative_error(got_db, db));
  q.dweight = again.data();
  k.conv_weight_grad(q, one_thread());
  check(got_dw == again, "conv dw depends on threads");
}

}  // namespace

int main() {
  return on_every_isa([](const KernelTable& k) {
    for (int side : {8, 4, 3, 2, 1, 9, 16})
      for (int64_t channels : {1, 16, 21, 70}) {
        test_shape<float>(k, 3, 4, side, channels, 7, true);
        test_shape<double>(k, 3, 2, side, channels, 7, true);
      }
    for (int kernel : {3, 5, 9, 11}) test_shape<float>(k, 3, 3, 4, 19, kernel, true);
    for (auto [h, w] : {std::pair{7, 7}, std::pair{1, 5}, std::pair{14, 28}, std::pair{9, 33}, std::pair{3, 1}})
      for (int kernel : {7, 5}) test_shape<float>(k, h, w, 1, 35, kernel, false);
  });
}
