// LayerNorm, GELU, GRN and the MLP's element-wise parts of every instruction set against formulas in double.
#include "harness.h"

using namespace cnx;
using namespace test;

namespace {

// Over the whole range of float arguments: the error must stay within a few units of float rounding of the result's
// scale, and the far tails must be exactly 0 and exactly a, up to infinity.
template <class A>
void test_gelu(const KernelTable& k, Activation act, double bound) {
  std::vector<A> a;
  for (double v = -20; v <= 20; v += 1.0 / 512) a.push_back(A(v));
  const size_t inner = a.size();
  for (A v : {A(0), A(100), A(1e4), A(1e20), A(3e38)}) {
    a.push_back(v);
    a.push_back(-v);
  }
  for (A v : {A(INFINITY), A(-INFINITY), A(NAN)}) a.push_back(v);
  const std::vector<A> ones(a.size(), A(1));
  std::vector<A> h = a, hs = a, slope = ones, sums(1);
  MlpRows p{};
  p.dtype = dtype_of<A>();
  p.segments = {nullptr, 1, 1, int64_t(a.size())};
  p.channels = 1;
  p.activation = act;
  p.a = h.data();
  p.sums = sums.data();
  k.gelu_square_sum(p, one_thread());
  const A one = 1, zero = 0;  // with them ds becomes its product with the slope
  p.a = hs.data();
  p.ds = slope.data();
  p.scale = &one;
  p.kappa = p.beta = &zero;
  k.mlp_backward_pointwise(p, one_thread());
  double value_error = 0, slope_error = 0;
  for (size_t i = 0; i < inner; ++i) {
    value_error = std::fmax(value_error, std::fabs(h[i] - gelu(act, a[i])) / std::fmax(1.0, std::fabs(double(a[i]))));
    slope_error = std::fmax(slope_error, std::fabs(slope[i] - gelu_slope(act, a[i])));
  }
  check(value_error < bound, "gelu error", value_error);
  check(slope_error < 3 * bound, "gelu slope error", slope_error);
  for (size_t i = inner; i + 3 < a.size(); ++i) {
    check(h[i] == (a[i] > 0 ? a[i] : 0), "gelu tails", a[i]);
    check(slope[i] == (a[i] == 0 ? A(0.5) : A(a[i] > 0)), "gelu slope tails", a[i]);
  }
  const A* last = &h[a.size() - 3];
  check(last[0] == A(INFINITY) && std::isnan(last[1]) && std::isnan(last[2]), "gelu of infinities and NaN");
}

template <class A>
void test_mlp(const KernelTable& k, int64_t channels, Activation act) {
  Random random(channels);
  const std::vector<int32_t> offsets = {3, 3, 8, 9};  // the first segment is empty; offsets need not start at 0
  const int64_t per_slot = 21, rows = 6 * per_slot, count = 3;
  auto a = random.vector<A>(rows * channels), ds = random.vector<A>(rows * channels);
  const auto scale = random.vector<A>(count * channels), kappa = random.vector<A>(count * channels);
  const auto beta = random.vector<A>(channels);
  for (auto& v : a) v *= 3;
  std::vector<double> hs(a.size()), da(a.size()), db(channels), t(count * channels), square(count * channels);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t s = r / per_slot < 5 ? 1 : 2;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c, j = s * channels + c;
      const double h = gelu(act, a[i]);
      t[j] += double(ds[i]) * h;
      square[j] += h * h;
      hs[i] = h * scale[j] + beta[c];
      da[i] = (double(ds[i]) * scale[j] + h * kappa[j]) * gelu_slope(act, a[i]);
      db[c] += da[i];
    }
  }
  const double bound = sizeof(A) == 4 ? 2e-6 : 1e-13;
  std::vector<A> sums(count * channels, A(NAN)), h = a, db_got(channels, A(NAN));
  MlpRows p{};
  p.dtype = dtype_of<A>();
  p.segments = {offsets.data(), per_slot, count, rows};
  p.channels = channels;
  p.activation = act;
  p.a = h.data();
  p.ds = ds.data();
  p.sums = sums.data();
  k.gelu_square_sum(p, two_threads());
  check(relative_error(sums, square) < bound, "square sums", relative_error(sums, square));
  p.a = a.data();
  k.mlp_backward_reduce(p, two_threads());
  check(relative_error(sums, t) < bound, "reduce", relative_error(sums, t));
  p.scale = scale.data();
  p.kappa = kappa.data();
  p.beta = beta.data();
  p.sums = db_got.data();
  k.mlp_backward_pointwise(p, two_threads());
  check(relative_error(a, hs) < bound, "h * scale + beta", relative_error(a, hs));
  check(relative_error(ds, da) < bound, "da", relative_error(ds, da));
  check(relative_error(db_got, db) < 4 * bound, "db1", relative_error(db_got, db));
}

template <class A>
void test_layer_norm(const KernelTable& k, int64_t channels) {
  Random random(channels + 5);
  const int64_t rows = 131;
  const auto x = random.vector<A>(rows * channels), grad = random.vector<A>(rows * channels);
  const auto weight = random.vector<A>(channels), bias = random.vector<A>(channels);
  const double eps = 1e-6;
  std::vector<double> y(x.size()), dx(x.size()), dw(channels), db(channels);
  for (int64_t r = 0; r < rows; ++r) {
    const A* row = &x[r * channels];
    double mean = 0, variance = 0, g_mean = 0, gz_mean = 0;
    for (int64_t c = 0; c < channels; ++c) mean += row[c] / double(channels);
    for (int64_t c = 0; c < channels; ++c) variance += (row[c] - mean) * (row[c] - mean) / channels;
    const double rstd = 1 / std::sqrt(variance + eps);
    for (int64_t c = 0; c < channels; ++c) {
      const double z = (row[c] - mean) * rstd, g = double(grad[r * channels + c]) * weight[c];
      y[r * channels + c] = z * weight[c] + bias[c];
      dw[c] += grad[r * channels + c] * z;
      db[c] += grad[r * channels + c];
      g_mean += g / channels;
      gz_mean += g * z / channels;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double z = (row[c] - mean) * rstd, g = double(grad[r * channels + c]) * weight[c];
      dx[r * channels + c] = rstd * (g - g_mean - z * gz_mean);
    }
  }
  const double bound = sizeof(A) == 4 ? 5e-6 : 1e-12;
  std::vector<A> got(x.size(), A(NAN)), mean(rows), rstd(rows), got_dx(x.size(), A(NAN)), got_dw(channels),
      got_db(channels);
  k.layer_norm_forward(
      {dtype_of<A>(), rows, channels, x.data(), weight.data(), bias.data(), eps, got.data(), mean.data(), rstd.data()},
      two_threads());
  check(relative_error(got, y) < bound, "layer norm", relative_error(got, y));
  k.layer_norm_backward({dtype_of<A>(), rows, channels, grad.data(), x.data(), mean.data(), rstd.data(), weight.data(),
                         got_dx.data(), got_dw.data(), got_db.data()},
                        two_threads());
  if (channels > 1)  // at one channel the exact gradient is 0 up to eps
    check(relative_error(got_dx, dx) < 10 * bound, "layer norm dx", relative_error(got_dx, dx));
  check(relative_error(got_dw, dw) < 10 * bound || channels == 1, "layer norm dw", relative_error(got_dw, dw));
  check(relative_error(got_db, db) < bound, "layer norm db", relative_error(got_db, db));
}

}  // namespace

int main() {
  for (const char* isa : {"avx512", "avx2", "baseline"}) {
    const KernelTable* k = find_kernels(isa);
    if (!k) {
      std::printf("%s: this processor lacks it, skipped\n", isa);
      continue;
    }
    for (Activation act : {Activation::gelu, Activation::gelu_tanh}) {
      test_gelu<float>(*k, act, 1.5e-7);
      test_gelu<double>(*k, act, 4e-16);
      for (int64_t channels : {1, 5, 16, 40, 67, 130}) {
        test_mlp<float>(*k, channels, act);
        test_mlp<double>(*k, channels, act);
      }
    }
    for (int64_t channels : {1, 5, 16, 40, 67, 130}) {
      test_layer_norm<float>(*k, channels);
      test_layer_norm<double>(*k, channels);
    }
    std::printf("%s: done\n", isa);
  }
  return failures() ? 1 : 0;
}
