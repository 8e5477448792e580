// GELU, GRN and the MLP's row kernels of the CUDA backend, run by the emulation, against formulas in double on the
// rounded inputs.
#include "../cuda/common/gelu.cuh"
#include "cuda_buffers.h"
#include "cuda_segments.h"

using namespace test;

namespace {

// Errors of the value, relative to the larger of |a| and 1, and of the slope; and the tails.
template <Activation kAct, class T>
void test_gelu(const char* name, double value_bound, double slope_bound) {
  using A = Acc<T>;
  double value_error = 0, slope_error = 0;
  A h, slope;
  for (double v = -20; v <= 20; v += 1.0 / 512) {
    activate_with_slope<kAct, T>(A(v), h, slope);
    value_error = std::fmax(value_error, std::fabs(h - gelu(kAct, v)) / std::fmax(1, std::fabs(v)));
    slope_error = std::fmax(slope_error, std::fabs(slope - gelu_slope(kAct, v)));
    check((activate<kAct, T>(A(v))) == h, "the same value without the slope", v);
  }
  check(value_error < value_bound, name, value_error);
  check(slope_error < slope_bound, name, slope_error);
  for (A v : {A(40), A(1e4), A(1e20), A(3e38)}) {
    activate_with_slope<kAct, T>(v, h, slope);
    check(h == v && slope == 1, "right tail", v);
    activate_with_slope<kAct, T>(-v, h, slope);
    check(h == 0 && slope == 0, "left tail", v);
  }
  check(std::isinf(activate<kAct, T>(A(INFINITY))), "infinity");
  for (A v : {A(-INFINITY), A(NAN)}) check(std::isnan(activate<kAct, T>(v)), "negative infinity, NaN", v);
}

void test_gelus() {
  constexpr Activation erf = Activation::gelu, tanh = Activation::gelu_tanh;
  test_gelu<erf, float>("float GELU", 1.5e-7, 3e-7);
  test_gelu<erf, double>("double GELU", 4e-16, 1e-15);
  test_gelu<erf, bf16>("bfloat16 GELU", 4e-5, 6e-5);
  test_gelu<tanh, float>("float tanh GELU", 1.5e-7, 3e-7);
  test_gelu<tanh, double>("double tanh GELU", 4e-16, 1e-15);
  test_gelu<tanh, bf16>("bfloat16 tanh GELU", 1e-6, 2e-6);
}

template <class T>
void test_segments(const Case& k, int64_t channels, bool misaligned, Activation act) {
  using A = Acc<T>;
  Random random(channels * 7 + k.rows + misaligned);
  const int64_t rows = k.rows, size = rows * channels, stats = k.count * channels;
  const double eps = 1e-6, rounding = kRounding<T>, summed = kSummed<T>;
  Buffer<T> a(size, misaligned), ds(size, misaligned), y(size, misaligned), dx(size, misaligned);
  Buffer<A> gamma(channels, misaligned), beta(channels);
  a.random(random, 3);
  ds.random(random);
  gamma.random(random);
  beta.random(random);
  if (channels > 2)  // a channel that is zero everywhere
    for (int64_t r = 0; r < rows; ++r) a.data()[r * channels + 2] = from_acc<T>(A(0));
  std::vector<double> h(size), slope(size), squares(stats), t(stats), dbeta(channels);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t j = k.owner(i / channels) * channels + i % channels;
    h[i] = act == Activation::identity ? a[i] : gelu(act, a[i]);
    slope[i] = act == Activation::identity ? 1 : gelu_slope(act, a[i]);
    squares[j] += h[i] * h[i];
    t[j] += ds[i] * h[i];
    dbeta[i % channels] += ds[i];
  }
  const Statistics s = statistics(k.count, channels, squares, t, gamma, eps);
  std::vector<double> grn(size), scaled(size), gradient(size), db(channels);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t c = i % channels, j = k.owner(i / channels) * channels + c;
    scaled[i] = h[i] * s.scale[j];
    grn[i] = scaled[i] + beta[c];
    gradient[i] = (ds[i] * s.scale[j] + h[i] * s.kappa[j]) * slope[i];
    db[c] += gradient[i];
  }
  const double root = std::sqrt(double(rows + 1));  // sums that cancel to the size of sqrt(rows) terms
  const double cancelled = kDType<T> == DType::bf16 ? summed * root : 2 * summed;

  Buffer<A> norm(stats), scale(stats), kappa(stats), dgamma(channels), sums(channels);
  if (act != Activation::gelu_tanh) {
    RUN(grn_forward, (GrnForward{.dtype = kDType<T>,
                                 .segments = k.segments(),
                                 .channels = channels,
                                 .gelu = act == Activation::gelu,
                                 .x = a.data(),
                                 .gamma = gamma.data(),
                                 .beta = beta.data(),
                                 .eps = eps,
                                 .y = y.data(),
                                 .norm = norm.data()}));
    compare(norm, s.norm, summed, "grn norm");
    compare(y, grn, rounding, "grn");
    RUN(grn_backward, (GrnBackward{.dtype = kDType<T>,
                                   .segments = k.segments(),
                                   .channels = channels,
                                   .gelu = act == Activation::gelu,
                                   .grad = ds.data(),
                                   .x = a.data(),
                                   .gamma = gamma.data(),
                                   .norm = norm.data(),
                                   .eps = eps,
                                   .dx = dx.data(),
                                   .dgamma = dgamma.data(),
                                   .dbeta = sums.data()}));
    compare(dx, gradient, rounding, "grn dx");
    compare(dgamma, s.dgamma, cancelled, "grn dgamma");
    compare(sums, dbeta, summed, "grn dbeta");
  }
  if (act == Activation::identity) return;

  Buffer<T> stored(size, misaligned);
  GeluStatistics g{.dtype = kDType<T>,
                   .segments = k.segments(),
                   .channels = channels,
                   .activation = act,
                   .a = a.data(),
                   .h = stored.data(),
                   .gamma = gamma.data(),
                   .eps = eps,
                   .norm = norm.data(),
                   .scale = scale.data()};
  RUN(gelu_statistics, g);
  compare(stored, h, rounding, "h");
  compare(norm, s.norm, summed, "norm");
  compare(scale, s.scale, summed, "scale");
  Buffer<A> norm_again(stats), scale_again(stats);
  g.h = nullptr;
  g.norm = norm_again.data();
  g.scale = scale_again.data();
  RUN(gelu_statistics, g);
  check(std::memcmp(norm.data(), norm_again.data(), stats * sizeof(A)) == 0, "norm does not depend on storing h");

  RUN(gelu_scale, (GeluScale{.dtype = kDType<T>,
                             .segments = k.segments(),
                             .channels = channels,
                             .activation = act,
                             .a = a.data(),
                             .scale = scale.data(),
                             .out = y.data()}));
  compare(y, scaled, rounding, "h * scale");
  RUN(gelu_scale, (GeluScale{.dtype = kDType<T>,
                             .segments = k.segments(),
                             .channels = channels,
                             .activation = Activation::identity,
                             .a = stored.data(),
                             .scale = scale.data(),
                             .out = stored.data()}));
  compare(stored, scaled, 2 * rounding, "stored h * scale, in place");
  RUN(gelu_scale, (GeluScale{.dtype = kDType<T>,
                             .segments = k.segments(),
                             .channels = channels,
                             .activation = act,
                             .a = a.data(),
                             .scale = scale.data(),
                             .beta = beta.data(),
                             .out = y.data()}));
  compare(y, grn, rounding, "h * scale + beta");

  Buffer<A> t_given(stats), scale_back(stats), dgamma_back(channels);
  for (int64_t i = 0; i < stats; ++i) t_given.data()[i] = A(t[i]);
  MlpBackwardStatistics b{.dtype = kDType<T>,
                          .segments = k.segments(),
                          .channels = channels,
                          .activation = act,
                          .a = a.data(),
                          .ds = ds.data(),
                          .norm = norm.data(),
                          .gamma = gamma.data(),
                          .eps = eps,
                          .scale = scale_back.data(),
                          .kappa = kappa.data(),
                          .dgamma = dgamma_back.data()};
  RUN(mlp_backward_statistics, b);
  compare(scale_back, s.scale, summed, "backward scale");
  compare(kappa, s.kappa, 2 * cancelled, "kappa");
  compare(dgamma_back, s.dgamma, cancelled, "dgamma");
  for (int64_t n = 0; channels > 2 && n < k.count; ++n) check(kappa[n * channels + 2] == 0, "kappa at norm 0");
  Buffer<A> kappa_again(stats), scale_third(stats), dgamma_again(channels);
  b.a = b.ds = nullptr;
  b.t = t_given.data();
  b.kappa = kappa_again.data();
  b.scale = scale_third.data();
  b.dgamma = dgamma_again.data();
  RUN(mlp_backward_statistics, b);
  compare(kappa_again, s.kappa, 2 * cancelled, "kappa from t");
  compare(scale_third, s.scale, summed, "scale from t");
  compare(dgamma_again, s.dgamma, cancelled, "dgamma from t");

  Buffer<A> db_got(channels), db_again(channels);
  Buffer<T> da(size, misaligned);
  MlpBackwardPointwise w{.dtype = kDType<T>,
                         .segments = k.segments(),
                         .channels = channels,
                         .activation = act,
                         .a = a.data(),
                         .ds = ds.data(),
                         .scale = scale.data(),
                         .kappa = kappa.data(),
                         .da = da.data(),
                         .db = db_got.data()};
  RUN(mlp_backward_pointwise, w);
  compare(da, gradient, rounding, "da");
  compare(db_got, db, summed * root, "db");
  w.hs = y.data();
  w.beta = beta.data();
  RUN(mlp_backward_pointwise, w);
  compare(y, grn, rounding, "hs + beta");
  w.beta = nullptr;
  w.hs = a.data();
  w.da = ds.data();
  w.db = db_again.data();
  RUN(mlp_backward_pointwise, w);
  compare(a, scaled, rounding, "hs, in place");
  compare(ds, gradient, rounding, "da, in place");
  check(std::memcmp(db_got.data(), db_again.data(), channels * sizeof(A)) == 0, "db does not depend on hs");
  if (k.count > 0) {
    std::vector<double> total(channels);
    for (int64_t i = 0; i < size; ++i) total[i % channels] += ds[i];
    Buffer<A> column(channels);
    RUN(column_sum,
        (ColumnSum{.dtype = kDType<T>, .rows = rows, .channels = channels, .x = ds.data(), .sums = column.data()}));
    compare(column, total, 4 * kRounding<A>, "column sum");
  }
}

// A chunk's statistics are the bits of the whole batch's.
template <class T>
void test_chunks() {
  const int64_t each = 90, channels = 40, count = 5;
  Random random(3);
  Buffer<T> a(count * each * channels);
  Buffer<Acc<T>> gamma(channels), norm(count * channels), scale(count * channels), one_norm(channels), one(channels);
  a.random(random, 3);
  gamma.random(random);
  RUN(gelu_statistics, (GeluStatistics{.dtype = kDType<T>,
                                       .segments = {.rows_per_slot = 1, .count = count, .rows = count * each},
                                       .channels = channels,
                                       .activation = Activation::gelu,
                                       .a = a.data(),
                                       .gamma = gamma.data(),
                                       .eps = 1e-6,
                                       .norm = norm.data(),
                                       .scale = scale.data()}));
  for (int64_t n = 0; n < count; ++n) {
    RUN(gelu_statistics, (GeluStatistics{.dtype = kDType<T>,
                                         .segments = {.rows_per_slot = 1, .count = 1, .rows = each},
                                         .channels = channels,
                                         .activation = Activation::gelu,
                                         .a = a.data() + n * each * channels,
                                         .gamma = gamma.data(),
                                         .eps = 1e-6,
                                         .norm = one_norm.data(),
                                         .scale = one.data()}));
    check(std::memcmp(one.data(), scale.data() + n * channels, channels * sizeof(Acc<T>)) == 0, "chunk by image");
  }
}

// Past 65504 a square sum must not overflow, a stored value must.
void test_half_range() {
  const int64_t rows = 40, channels = 8;
  Buffer<f16> a(rows * channels), y(rows * channels);
  Buffer<float> gamma(channels), beta(channels), norm(channels);
  for (int64_t i = 0; i < rows * channels; ++i) a.data()[i] = __float2half_rn(i % 2 ? 60000.f : 1000.f);
  for (int64_t c = 0; c < channels; ++c) {
    gamma.data()[c] = 1;
    beta.data()[c] = 0;
  }
  RUN(grn_forward, (GrnForward{.dtype = DType::f16,
                               .segments = {.rows_per_slot = 1, .count = 1, .rows = rows},
                               .channels = channels,
                               .gelu = true,
                               .x = a.data(),
                               .gamma = gamma.data(),
                               .beta = beta.data(),
                               .eps = 1e-6,
                               .y = y.data(),
                               .norm = norm.data()}));
  check(std::fabs(norm[1] / (60000 * std::sqrt(40.0)) - 1) < 1e-6, "float16 square sums", norm[1]);
  check(std::isinf(y[1]) && !std::isinf(y[0]), "float16 overflow", y[1]);
}

// So many partial sums that they are added in groups first; 5 and 129 columns have 51 and few rows per block.
template <class T>
void test_many_sums() {
  const int64_t rows = 21000, channels = 129;
  Random random(9);
  Buffer<T> x(rows * channels);
  Buffer<Acc<T>> sums(channels);
  x.random(random);
  std::vector<double> expected(channels);
  for (int64_t i = 0; i < rows * channels; ++i) expected[i % channels] += value(x[i]);
  RUN(column_sum,
      (ColumnSum{.dtype = kDType<T>, .rows = rows, .channels = channels, .x = x.data(), .sums = sums.data()}));
  compare(sums, expected, 4 * kRounding<Acc<T>>, "sum of many rows");
}

template <class T>
void test_type(const char* name) {
  for (const Case& k : cases())
    for (int64_t channels : {1, 5, 16, 40, 67, 264})
      for (bool misaligned : {false, true})
        for (Activation act : {Activation::identity, Activation::gelu, Activation::gelu_tanh}) {
          const int before = failures();
          test_segments<T>(k, channels, misaligned, act);
          if (failures() > before)
            std::printf("  in %s, %s, %d channels, misaligned %d, activation %d\n", name, k.name, int(channels),
                        misaligned, int(act));
        }
  // more splits than a finisher adds, more column tiles than one
  test_segments<T>({"many splits", {}, 1, 1, 27500}, 5, false, Activation::gelu);
  test_segments<T>({"wide", {}, 1, 2, 20}, 1280, false, Activation::gelu);
  test_chunks<T>();
  test_many_sums<T>();
  std::printf("%s: done\n", name);
}

}  // namespace

int main() {
  test_gelus();
  test_half_range();
  return on_every_type([](auto type, const char* name) { test_type<decltype(type)>(name); });
}
