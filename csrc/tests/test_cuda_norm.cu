// LayerNorm, its downsampling form and GRN of it, of the CUDA backend, run by the emulation, against formulas in double
// on the rounded inputs.
#include "cuda_buffers.h"
#include "cuda_segments.h"

using namespace test;

namespace {

constexpr int64_t kMostHeldChannels = 3072;  // past it LN(x) is rounded once more: kMostHeld

// A mean a thousand times the deviation must not cancel in the variance.
void test_large_mean(int64_t channels) {
  Random random(1);
  Buffer<float> x(channels), y(channels), mean(1), rstd(1);
  double expected_mean = 0, variance = 0;
  for (int64_t c = 0; c < channels; ++c) expected_mean += (x.data()[c] = float(1000 + random.uniform())) / channels;
  for (int64_t c = 0; c < channels; ++c) variance += std::pow(x[c] - expected_mean, 2) / channels;
  RUN(layer_norm_forward, (LayerNormForward{.dtype = DType::f32,
                                            .rows = 1,
                                            .channels = channels,
                                            .x = x.data(),
                                            .eps = 1e-6,
                                            .y = y.data(),
                                            .mean = mean.data(),
                                            .rstd = rstd.data()}));
  check(std::fabs(rstd[0] * std::sqrt(variance + 1e-6) - 1) < 1e-5, "rstd beside a large mean", rstd[0]);
}

struct NormExpected {
  std::vector<double> y, mean, rstd, dx, dweight, dbias;
};

template <class T, class A>
NormExpected norm_expected(int64_t rows, int64_t channels, const Buffer<T>& x, const Buffer<T>& grad,
                           const Buffer<A>* weight, const Buffer<A>* bias, double eps, const Buffer<A>* rstd_given) {
  NormExpected e{std::vector<double>(rows * channels), std::vector<double>(rows),     std::vector<double>(rows),
                 std::vector<double>(rows * channels), std::vector<double>(channels), std::vector<double>(channels)};
  std::vector<double> z(channels), g(channels);
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0, variance = 0, g_mean = 0, gz_mean = 0;
    for (int64_t c = 0; c < channels; ++c) mean += x[r * channels + c] / channels;
    for (int64_t c = 0; c < channels; ++c) variance += std::pow(x[r * channels + c] - mean, 2) / channels;
    const double rstd = rstd_given ? (*rstd_given)[r] : 1 / std::sqrt(variance + eps);
    e.mean[r] = mean;
    e.rstd[r] = rstd;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      z[c] = rstd_given ? x[i] : (x[i] - mean) * rstd;
      g[c] = grad[i] * (weight ? (*weight)[c] : 1);
      e.y[i] = z[c] * (weight ? (*weight)[c] : 1) + (bias ? (*bias)[c] : 0);
      e.dweight[c] += grad[i] * z[c];
      e.dbias[c] += grad[i];
      g_mean += g[c] / channels;
      gz_mean += g[c] * z[c] / channels;
    }
    for (int64_t c = 0; c < channels; ++c) e.dx[r * channels + c] = rstd * (g[c] - g_mean - z[c] * gz_mean);
  }
  return e;
}

template <class T>
void test_layer_norm(int64_t rows, int64_t channels, bool misaligned, bool affine) {
  using A = Acc<T>;
  Random random(channels + rows);
  const double eps = 1e-6, rounding = 2 * kRounding<T>, summed = 4 * kRounding<A>;
  Buffer<T> x(rows * channels, misaligned), grad(rows * channels, misaligned), y(rows * channels, misaligned);
  Buffer<A> weight(channels), bias(channels), mean(rows), rstd(rows), dweight(channels), dbias(channels);
  x.random(random, 2);
  grad.random(random);
  weight.random(random);
  bias.random(random);
  const void *w = affine ? weight.data() : nullptr, *b = affine ? bias.data() : nullptr;
  NormExpected e =
      norm_expected<T, A>(rows, channels, x, grad, affine ? &weight : nullptr, affine ? &bias : nullptr, eps, nullptr);
  RUN(layer_norm_forward, (LayerNormForward{.dtype = kDType<T>,
                                            .rows = rows,
                                            .channels = channels,
                                            .x = x.data(),
                                            .weight = w,
                                            .bias = b,
                                            .eps = eps,
                                            .y = y.data(),
                                            .mean = mean.data(),
                                            .rstd = rstd.data()}));
  compare(y, e.y, rounding, "layer norm");
  compare(mean, e.mean, summed, "mean");
  compare(rstd, e.rstd, summed, "rstd");
  Buffer<T> dx(rows * channels, misaligned), dx_alone(rows * channels, misaligned);
  LayerNormBackward back{.dtype = kDType<T>,
                         .rows = rows,
                         .channels = channels,
                         .grad = grad.data(),
                         .x = x.data(),
                         .mean = mean.data(),
                         .rstd = rstd.data(),
                         .weight = w,
                         .dx = dx.data(),
                         .dweight = dweight.data(),
                         .dbias = dbias.data()};
  RUN(layer_norm_backward, back);
  if (channels > 1) compare(dx, e.dx, rounding, "layer norm dx");  // at one channel: 0 up to eps
  if (channels > 1) compare(dweight, e.dweight, 4 * summed, "layer norm dweight");
  compare(dbias, e.dbias, summed, "layer norm dbias");

  // of normalised rows
  e = norm_expected<T, A>(rows, channels, x, grad, affine ? &weight : nullptr, nullptr, eps, &rstd);
  Buffer<A> dbias_alone(channels), dweight_again(channels);
  back.mean = nullptr;
  back.dx = dx_alone.data();
  back.dweight = nullptr;
  back.dbias = dbias_alone.data();
  RUN(layer_norm_backward, back);
  compare(dx_alone, e.dx, rounding, "normalised dx");
  compare(dbias_alone, e.dbias, summed, "dbias alone");
  Buffer<T> dx_last(rows * channels, misaligned);
  back.dx = dx_last.data();
  back.dbias = nullptr;
  RUN(layer_norm_backward, back);
  compare(dx_last, e.dx, rounding, "normalised dx alone");
  back.dweight = dweight_again.data();
  RUN(layer_norm_backward, back);
  compare(dweight_again, e.dweight, 4 * summed, "normalised dweight");
}

template <class T>
void test_space_to_depth(int64_t maps, int64_t height, int64_t width, int64_t channels, bool misaligned, bool affine) {
  using A = Acc<T>;
  Random random(channels + width);
  const int64_t rows = maps * height * width, size = rows * channels;
  const double eps = 1e-6, rounding = 2 * kRounding<T>, summed = 4 * kRounding<A>;
  Buffer<T> x(size, misaligned), grad(size, misaligned), y(size, misaligned), dx(size, misaligned);
  Buffer<A> weight(channels), bias(channels), rstd(rows), dweight(channels), dbias(channels);
  x.random(random, 2);
  grad.random(random);
  weight.random(random);
  bias.random(random);
  const auto blocked = [&](int64_t r) {
    const int64_t map = r / (height * width), i = r / width % height, j = r % width;
    return ((map * (height / 2) + i / 2) * (width / 2) + j / 2) * 4 + i % 2 * 2 + j % 2;
  };
  const auto rearrange = [&](const std::vector<double>& in, bool forward) {
    std::vector<double> out(in.size());
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < channels; ++c)
        (forward ? out[blocked(r) * channels + c] : out[r * channels + c]) =
            forward ? in[r * channels + c] : in[blocked(r) * channels + c];
    return out;
  };
  SpaceToDepthNorm p{};
  p.dtype = kDType<T>;
  p.maps = maps;
  p.height = height;
  p.width = width;
  p.channels = channels;
  p.x = x.data();
  p.weight = affine ? weight.data() : nullptr;
  p.bias = affine ? bias.data() : nullptr;
  p.eps = eps;
  p.out = y.data();
  p.rstd = rstd.data();
  RUN(space_to_depth_norm_forward, p);
  NormExpected e =
      norm_expected<T, A>(rows, channels, x, grad, affine ? &weight : nullptr, affine ? &bias : nullptr, eps, nullptr);
  compare(y, rearrange(e.y, true), rounding, "space to depth");
  compare(rstd, e.rstd, summed, "space to depth rstd");

  // x stands in for z; the rows of the expectation lie as y does, and so must its rstd
  Buffer<A> rstd_blocked(rows);
  for (int64_t r = 0; r < rows; ++r) rstd_blocked.data()[blocked(r)] = rstd.data()[r];
  e = norm_expected<T, A>(rows, channels, x, grad, affine ? &weight : nullptr, nullptr, eps, &rstd_blocked);
  p.x = grad.data();
  p.z = x.data();
  p.out = dx.data();
  p.dweight = dweight.data();
  p.dbias = dbias.data();
  RUN(space_to_depth_norm_backward, p);
  compare(dx, rearrange(e.dx, false), rounding, "space to depth dx");
  compare(dweight, e.dweight, 4 * summed, "space to depth dweight");
  compare(dbias, e.dbias, summed, "space to depth dbias");
}

// Visible rows of two maps of 3x2 patches; hidden ones, NaN, are neither read nor written.
template <class T>
void test_gather_norm(int64_t side, int64_t channels, bool misaligned, bool affine) {
  using A = Acc<T>;
  Random random(channels + side);
  const int64_t grid_h = 3, grid_w = 2, area = side * side, sites = 2 * grid_h * grid_w * area;
  std::vector<int32_t> patches{0, 3, 7, 10, 11};
  const int64_t rows = static_cast<int64_t>(patches.size()) * area, size = rows * channels;
  const double eps = 1e-6, rounding = 2 * kRounding<T>, summed = 4 * kRounding<A>;
  Buffer<T> x(size), map(sites * channels, misaligned), grad(size, misaligned), y(size, misaligned);
  Buffer<T> dx(sites * channels, misaligned);
  Buffer<A> weight(channels), bias(channels), rstd(rows), dweight(channels), dbias(channels);
  x.random(random, 2);
  grad.random(random);
  weight.random(random);
  bias.random(random);
  const auto place = [&](int64_t r) {
    const int64_t patch = patches[r / area], line = patch / grid_w * side + r % area / side;
    return line * grid_w * side + patch % grid_w * side + r % side;
  };
  for (int64_t i = 0; i < sites * channels; ++i) dx.data()[i] = from_acc<T>(A(7));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) map.data()[place(r) * channels + c] = x.data()[r * channels + c];
  GatherNorm p{.dtype = kDType<T>,
               .grid_h = grid_h,
               .grid_w = grid_w,
               .side = side,
               .slots = static_cast<int64_t>(patches.size()),
               .channels = channels,
               .patch_of_slot = patches.data(),
               .x = map.data(),
               .weight = affine ? weight.data() : nullptr,
               .bias = affine ? bias.data() : nullptr,
               .eps = eps,
               .out = y.data(),
               .rstd = rstd.data()};
  RUN(gather_norm_forward, p);
  NormExpected e =
      norm_expected<T, A>(rows, channels, x, grad, affine ? &weight : nullptr, affine ? &bias : nullptr, eps, nullptr);
  compare(y, e.y, rounding, "gathered norm");
  compare(rstd, e.rstd, summed, "gathered norm rstd");
  e = norm_expected<T, A>(rows, channels, x, grad, affine ? &weight : nullptr, nullptr, eps, &rstd);
  p.x = grad.data();
  p.z = x.data();  // stands in for z
  p.out = dx.data();
  p.dweight = affine ? dweight.data() : nullptr;
  p.dbias = affine ? dbias.data() : nullptr;
  RUN(gather_norm_backward, p);
  std::vector<double> expected(sites * channels, 7.0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < channels; ++c) expected[place(r) * channels + c] = e.dx[r * channels + c];
  compare(dx, expected, rounding, "gathered norm dx");
  if (affine) compare(dweight, e.dweight, 4 * summed, "gathered norm dweight");
  if (affine) compare(dbias, e.dbias, summed, "gathered norm dbias");
}

// GRN of LayerNorm and its gradient. NaN in a segment must stay there; its rows are left out of the comparison.
template <class T>
void test_layer_norm_grn(const Case& k, int64_t channels, bool misaligned, int64_t poisoned = -1) {
  using A = Acc<T>;
  const int64_t rows = k.rows, size = rows * channels, stats = k.count * channels;
  const double ln_eps = 1e-6, eps = 1e-6;
  // z as the kernel has it is rounded once more, and kappa magnifies what t cancels
  const double rounding = 2 * kRounding<T>, summed = 8 * kRounding<A>, gradient = rounding + 40 * kRounding<A>;
  Random random(channels + rows);
  Buffer<T> x(size, misaligned), grad(size, misaligned), y(size, misaligned), dx(size, misaligned);
  Buffer<A> weight(channels), bias(channels), gamma(channels), beta(channels), mean(rows), rstd(rows), norm(stats);
  Buffer<A> dweight(channels), dbias(channels), dgamma(channels), dbeta(channels);
  x.random(random, 2);
  grad.random(random);
  for (Buffer<A>* p : {&weight, &bias, &gamma, &beta}) p->random(random);
  if (channels > 2) weight.data()[2] = bias.data()[2] = 0;  // a channel whose norm is 0

  std::vector<double> z(size), v(size), r(rows), squares(stats), t(stats);
  for (int64_t i = 0; i < rows; ++i) {
    double mu = 0, variance = 0;
    for (int64_t c = 0; c < channels; ++c) mu += x[i * channels + c] / channels;
    for (int64_t c = 0; c < channels; ++c) variance += std::pow(x[i * channels + c] - mu, 2) / channels;
    r[i] = 1 / std::sqrt(variance + ln_eps);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = i * channels + c, own = k.owner(i) * channels + c;
      z[at] = (x[at] - mu) * r[i];
      v[at] = z[at] * weight[c] + bias[c];
      squares[own] += v[at] * v[at];
      t[own] += grad[at] * v[at];
    }
  }
  const Statistics s = statistics(k.count, channels, squares, t, gamma, eps);
  std::vector<double> y_expected(size), dx_expected(size), dw(channels), db(channels), dbeta_expected(channels);
  for (int64_t i = 0; i < rows; ++i) {
    double g_mean = 0, gz_mean = 0;
    std::vector<double> g(channels);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = i * channels + c, own = k.owner(i) * channels + c;
      y_expected[at] = v[at] * s.scale[own] + beta[c];
      const double dv = grad[at] * s.scale[own] + v[at] * s.kappa[own];
      dw[c] += dv * z[at];
      db[c] += dv;
      dbeta_expected[c] += grad[at];
      g[c] = dv * weight[c];
      g_mean += g[c] / channels;
      gz_mean += g[c] * z[at] / channels;
    }
    for (int64_t c = 0; c < channels; ++c)
      dx_expected[i * channels + c] = r[i] * (g[c] - g_mean - z[i * channels + c] * gz_mean);
  }
  const auto leave_out = [&](Buffer<T>& got, std::vector<double>& expected) {
    for (int64_t i = 0; i < size; ++i) {
      if (k.owner(i / channels) != poisoned) continue;
      check(std::isnan(got[i]), "NaN fills its segment", double(i));
      got.data()[i] = from_acc<T>(0);
      expected[i] = 0;
    }
  };
  for (int64_t i = 0; i < rows; ++i)
    if (k.owner(i) == poisoned)
      for (int64_t c = 0; c < channels; ++c) x.data()[i * channels + c] = from_acc<T>(NAN);

  RUN(layer_norm_grn_forward, (LayerNormGrnForward{.dtype = kDType<T>,
                                                   .segments = k.segments(),
                                                   .channels = channels,
                                                   .x = x.data(),
                                                   .ln_weight = weight.data(),
                                                   .ln_bias = bias.data(),
                                                   .gamma = gamma.data(),
                                                   .beta = beta.data(),
                                                   .ln_eps = ln_eps,
                                                   .eps = eps,
                                                   .y = y.data(),
                                                   .mean = mean.data(),
                                                   .rstd = rstd.data(),
                                                   .norm = norm.data()}));
  RUN(layer_norm_grn_backward, (LayerNormGrnBackward{.dtype = kDType<T>,
                                                     .segments = k.segments(),
                                                     .channels = channels,
                                                     .grad = grad.data(),
                                                     .x = x.data(),
                                                     .mean = mean.data(),
                                                     .rstd = rstd.data(),
                                                     .ln_weight = weight.data(),
                                                     .ln_bias = bias.data(),
                                                     .gamma = gamma.data(),
                                                     .norm = norm.data(),
                                                     .eps = eps,
                                                     .dx = dx.data(),
                                                     .dln_weight = dweight.data(),
                                                     .dln_bias = dbias.data(),
                                                     .dgamma = dgamma.data(),
                                                     .dbeta = dbeta.data()}));
  if (poisoned >= 0) {
    leave_out(y, y_expected);
    leave_out(dx, dx_expected);
  }
  compare(y, y_expected, channels > kMostHeldChannels ? 2 * rounding : rounding, "layer norm grn");
  if (channels > 1) compare(dx, dx_expected, channels > kMostHeldChannels ? 2 * gradient : gradient, "its dx");
  compare(dbeta, dbeta_expected, summed, "its dbeta");
  if (poisoned >= 0) return;
  compare(rstd, r, summed, "its rstd");
  compare(norm, s.norm, channels > kMostHeldChannels ? rounding : summed, "its norm");
  if (channels > 1) compare(dweight, dw, gradient, "its dln_weight");
  compare(dbias, db, gradient, "its dln_bias");
  compare(dgamma, s.dgamma, gradient, "its dgamma");
}

template <class T>
void test_type(const char* name) {
  for (int64_t channels : {1, 5, 16, 40, 67, 96, 200, 264, 776, 1032, 1283, 2816})
    for (bool misaligned : {false, true})
      for (int64_t rows : {0, 1, channels < 300 ? 333 : 37}) {
        const int before = failures();
        test_layer_norm<T>(rows, channels, misaligned, channels % 3 != 2);
        if (failures() > before)
          std::printf("  in %s, %d rows, %d channels, misaligned %d\n", name, int(rows), int(channels), misaligned);
      }
  test_layer_norm<T>(40000, 8, false, true);  // several steps per block
  for (int64_t channels : {5, 40, 1032})
    for (bool affine : {false, true}) {
      test_space_to_depth<T>(2, 4, 6, channels, false, affine);
      test_space_to_depth<T>(3, 2, 2, channels, true, affine);
    }
  test_space_to_depth<T>(0, 4, 4, 8, false, true);
  for (int64_t channels : {5, 40, 1032})
    for (int64_t side : {1, 3, 4})
      for (bool affine : {false, true}) test_gather_norm<T>(side, channels, channels == 40 && affine, affine);
  for (const Case& k : cases())
    for (int64_t channels : {1, 5, 40, 96, 264, 776, 1283, 1408, 3080})
      for (bool misaligned : {false, true}) {
        if ((channels > 300 && k.rows > 300) || (misaligned && channels % 2)) continue;
        const int before = failures();
        test_layer_norm_grn<T>(k, channels, misaligned);
        if (failures() > before)
          std::printf("  in %s, %s, %d channels, misaligned %d\n", name, k.name, int(channels), misaligned);
      }
  test_layer_norm_grn<T>({"many splits", {}, 1, 1, 30000}, 8, false);
  for (int64_t channels : {5, 40, 1408, 3080})
    test_layer_norm_grn<T>({"poisoned", {0, 2, 3, 9}, 1, 3, 9}, channels, false, 1);
  std::printf("%s: done\n", name);
}

}  // namespace

int main() {
  test_large_mean(96);
  test_large_mean(1032);
  return on_every_type([](auto type, const char* name) { test_type<decltype(type)>(name); });
}
