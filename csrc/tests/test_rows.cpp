// LayerNorm, GELU, GRN, GRN of LayerNorm and the MLP's element-wise parts of every instruction set against formulas in
// double.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "harness.h"

using namespace cnx;
using namespace test;

// What kernels allocate, all of which is scratch memory (csrc/cpu/parallel.h).
static std::atomic<size_t> scratch_bytes;
extern "C" void* aligned_alloc(size_t alignment, size_t bytes) noexcept {
  scratch_bytes += bytes;
  void* memory = nullptr;
  return posix_memalign(&memory, alignment, bytes) ? nullptr : memory;
}

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
  const Segments segments{.rows_per_slot = 1, .count = 1, .rows = int64_t(a.size())};
  const A one = 1, zero = 0;  // with them ds becomes its product with the slope
  A norm, scale;
  k.gelu_statistics({.dtype = dtype_of<A>(),
                     .segments = segments,
                     .channels = 1,
                     .activation = act,
                     .a = h.data(),
                     .h = h.data(),
                     .gamma = &one,
                     .norm = &norm,
                     .scale = &scale},
                    one_thread());
  k.mlp_backward_pointwise({.dtype = dtype_of<A>(),
                            .segments = segments,
                            .channels = 1,
                            .activation = act,
                            .a = hs.data(),
                            .ds = slope.data(),
                            .scale = &one,
                            .kappa = &zero,
                            .beta = &zero,
                            .hs = hs.data(),
                            .da = slope.data(),
                            .db = sums.data()},
                           one_thread());
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

// The four passes, and GRN, which is made of them; every optional argument given and not.
template <class A>
void test_mlp(const KernelTable& k, int64_t channels, Activation act) {
  Random random(channels);
  const std::vector<int32_t> offsets = {3, 3, 8, 9};  // the first segment is empty; offsets need not start at 0
  const int64_t per_slot = 21, rows = 6 * per_slot, count = 3, size = rows * channels;
  const double eps = 1e-6;
  auto a = random.vector<A>(size), ds = random.vector<A>(size);
  const auto gamma = random.vector<A>(channels), beta = random.vector<A>(channels);
  for (auto& v : a) v *= 3;
  const auto value = [&](int64_t i) { return act == Activation::identity ? double(a[i]) : gelu(act, a[i]); };
  const auto slope = [&](int64_t i) { return act == Activation::identity ? 1.0 : gelu_slope(act, a[i]); };
  const auto stat = [&](int64_t i) { return (i / channels / per_slot < 5 ? 1 : 2) * channels + i % channels; };
  std::vector<double> h(size), t(count * channels), dbeta(channels), norm(t), scale(t), kappa(t), dgamma(channels);
  for (int64_t i = 0; i < size; ++i) {
    h[i] = value(i);
    norm[stat(i)] += h[i] * h[i];
    t[stat(i)] += ds[i] * h[i];
    dbeta[i % channels] += ds[i];
  }
  for (int64_t n = 0; n < count; ++n) {
    double sum = 0, dot = 0;
    for (int64_t i = n * channels; i < (n + 1) * channels; ++i) {
      norm[i] = std::sqrt(norm[i]);
      sum += norm[i];
      dot += gamma[i % channels] * t[i] * norm[i];
    }
    const double m = sum / channels + eps;
    for (int64_t i = n * channels; i < (n + 1) * channels; ++i) {
      const double g = gamma[i % channels];
      scale[i] = 1 + g * norm[i] / m;
      kappa[i] = norm[i] > 0 ? (g * t[i] / m - dot / (channels * m * m)) / norm[i] : 0;
      dgamma[i % channels] += norm[i] / m * t[i];
    }
  }
  std::vector<double> hs(size), grn(size), da(size), db(channels);
  for (int64_t i = 0; i < size; ++i) {
    hs[i] = h[i] * scale[stat(i)];
    grn[i] = hs[i] + beta[i % channels];
    da[i] = (ds[i] * scale[stat(i)] + h[i] * kappa[stat(i)]) * slope(i);
    db[i % channels] += da[i];
  }
  const double bound = sizeof(A) == 4 ? 5e-6 : 1e-12;
  const auto compare = [&](const std::vector<A>& got, const std::vector<double>& expected, const char* what) {
    check(relative_error(got, expected) < bound, what, relative_error(got, expected));
  };
  const DType dtype = dtype_of<A>();
  const Segments segments{.offsets = offsets.data(), .rows_per_slot = per_slot, .count = count, .rows = rows};
  const std::vector<A> blank(size, A(NAN)), blank_stat(count * channels, A(NAN)), blank_row(channels, A(NAN));
  std::vector<A> got = blank, got_norm = blank_stat, got_scale = blank_stat, got_kappa = blank_stat;
  std::vector<A> got_dgamma = blank_row, got_db = blank_row, got_da = blank, h_stored = blank;
  if (act != Activation::gelu_tanh) {
    const bool with_gelu = act == Activation::gelu;
    k.grn_forward({.dtype = dtype,
                   .segments = segments,
                   .channels = channels,
                   .gelu = with_gelu,
                   .x = a.data(),
                   .gamma = gamma.data(),
                   .beta = beta.data(),
                   .eps = eps,
                   .y = got.data(),
                   .norm = got_norm.data()},
                  two_threads());
    compare(got, grn, "grn");
    compare(got_norm, norm, "grn norm");
    k.grn_backward({.dtype = dtype,
                    .segments = segments,
                    .channels = channels,
                    .gelu = with_gelu,
                    .grad = ds.data(),
                    .x = a.data(),
                    .gamma = gamma.data(),
                    .norm = got_norm.data(),
                    .eps = eps,
                    .dx = got_da.data(),
                    .dgamma = got_dgamma.data(),
                    .dbeta = got_db.data()},
                   two_threads());
    compare(got_da, da, "grn dx");
    compare(got_dgamma, dgamma, "grn dgamma");
    compare(got_db, dbeta, "grn dbeta");
  }

  GeluStatistics statistics{.dtype = dtype,
                            .segments = segments,
                            .channels = channels,
                            .activation = act,
                            .a = a.data(),
                            .h = h_stored.data(),
                            .gamma = gamma.data(),
                            .eps = eps,
                            .norm = got_norm.data(),
                            .scale = got_scale.data()};
  k.gelu_statistics(statistics, two_threads());
  compare(h_stored, h, "h");
  compare(got_norm, norm, "norm");
  compare(got_scale, scale, "scale");
  std::vector<A> again = blank_stat;
  statistics.h = nullptr;
  statistics.norm = again.data();
  k.gelu_statistics(statistics, two_threads());
  check(again == got_norm, "norm does not depend on storing h");

  GeluScale scaled{.dtype = dtype, .segments = segments, .channels = channels, .activation = act, .a = a.data()};
  scaled.out = got.data();
  k.gelu_scale(scaled, two_threads());
  compare(got, h, "neither scale nor beta");
  scaled.scale = got_scale.data();
  k.gelu_scale(scaled, two_threads());
  compare(got, hs, "h * scale");
  scaled.activation = Activation::identity;
  scaled.a = scaled.out = h_stored.data();
  scaled.beta = beta.data();
  k.gelu_scale(scaled, two_threads());
  compare(h_stored, grn, "h * scale + beta in place");

  MlpBackwardStatistics backward{.dtype = dtype,
                                 .segments = segments,
                                 .channels = channels,
                                 .activation = act,
                                 .a = a.data(),
                                 .ds = ds.data(),
                                 .norm = got_norm.data(),
                                 .gamma = gamma.data(),
                                 .eps = eps,
                                 .scale = got_scale.data(),
                                 .kappa = got_kappa.data(),
                                 .dgamma = got_dgamma.data()};
  got_scale = blank_stat;
  k.mlp_backward_statistics(backward, two_threads());
  compare(got_scale, scale, "backward scale");
  compare(got_dgamma, dgamma, "dgamma");
  if (channels > 1) compare(got_kappa, kappa, "kappa");  // at one channel it cancels to 0 up to eps
  const std::vector<A> given(t.begin(), t.end());
  again = blank_stat;
  backward.a = backward.ds = nullptr;
  backward.t = given.data();
  backward.kappa = again.data();
  k.mlp_backward_statistics(backward, two_threads());
  if (channels > 1) compare(again, kappa, "kappa from t");

  MlpBackwardPointwise pointwise{.dtype = dtype,
                                 .segments = segments,
                                 .channels = channels,
                                 .activation = act,
                                 .a = a.data(),
                                 .ds = ds.data(),
                                 .scale = got_scale.data(),
                                 .kappa = got_kappa.data(),
                                 .da = got_da.data(),
                                 .db = got_db.data()};
  k.mlp_backward_pointwise(pointwise, two_threads());
  compare(got_da, da, "da");
  compare(got_db, db, "db");
  pointwise.hs = got.data();
  k.mlp_backward_pointwise(pointwise, two_threads());
  compare(got, hs, "hs");
  std::vector<A> db_again = blank_row;
  pointwise.hs = a.data();
  pointwise.da = ds.data();
  pointwise.beta = beta.data();
  pointwise.db = db_again.data();
  k.mlp_backward_pointwise(pointwise, two_threads());
  compare(a, grn, "hs + beta in place");
  compare(ds, da, "da in place");
  check(db_again == got_db, "db does not depend on hs");
  std::vector<double> total(channels);
  for (int64_t i = 0; i < size; ++i) total[i % channels] += ds[i];
  k.column_sum({.dtype = dtype, .rows = rows, .channels = channels, .x = ds.data(), .sums = got_db.data()},
               two_threads());
  compare(got_db, total, "column sum");
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
  k.layer_norm_forward({.dtype = dtype_of<A>(),
                        .rows = rows,
                        .channels = channels,
                        .x = x.data(),
                        .weight = weight.data(),
                        .bias = bias.data(),
                        .eps = eps,
                        .y = got.data(),
                        .mean = mean.data(),
                        .rstd = rstd.data()},
                       two_threads());
  check(relative_error(got, y) < bound, "layer norm", relative_error(got, y));
  k.layer_norm_backward({.dtype = dtype_of<A>(),
                         .rows = rows,
                         .channels = channels,
                         .grad = grad.data(),
                         .x = x.data(),
                         .mean = mean.data(),
                         .rstd = rstd.data(),
                         .weight = weight.data(),
                         .dx = got_dx.data(),
                         .dweight = got_dw.data(),
                         .dbias = got_db.data()},
                        two_threads());
  if (channels > 1)  // at one channel the exact gradient is 0 up to eps
    check(relative_error(got_dx, dx) < 10 * bound, "layer norm dx", relative_error(got_dx, dx));
  check(relative_error(got_dw, dw) < 10 * bound || channels == 1, "layer norm dw", relative_error(got_dw, dw));
  check(relative_error(got_db, db) < bound, "layer norm db", relative_error(got_db, db));
}

// The visible rows of two maps of 2x3 patches of side 2 as LayerNorm's own rows; hidden ones, NaN, are neither read nor
// written.
template <class A>
void test_gather_norm(const KernelTable& k, int64_t channels) {
  constexpr int64_t side = 2, grid_h = 2, grid_w = 3, area = side * side, sites = 2 * grid_h * grid_w * area;
  const std::vector<int32_t> patches{1, 5, 6, 10};
  const int64_t rows = static_cast<int64_t>(patches.size()) * area, size = rows * channels;
  std::vector<int64_t> place(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t patch = patches[r / area], image_row = patch / grid_w * side + r % area / side;
    place[r] = image_row * grid_w * side + patch % grid_w * side + r % side;
  }
  Random random(channels);
  const std::vector<A> packed = random.vector<A>(size), grad = random.vector<A>(size);
  const std::vector<A> weight = random.vector<A>(channels), bias = random.vector<A>(channels);
  std::vector<A> map(sites * channels, A(NAN)), dx(sites * channels, A(7));
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(packed.begin() + r * channels, channels, map.begin() + place[r] * channels);
  std::vector<A> y(size), mean(rows), rstd(rows), got(size, A(NAN)), got_rstd(rows, A(NAN));
  std::vector<A> grads(size), dw(channels), db(channels), got_dw(channels), got_db(channels);
  k.layer_norm_forward({.dtype = dtype_of<A>(),
                        .rows = rows,
                        .channels = channels,
                        .x = packed.data(),
                        .weight = weight.data(),
                        .bias = bias.data(),
                        .eps = 1e-6,
                        .y = y.data(),
                        .mean = mean.data(),
                        .rstd = rstd.data()},
                       two_threads());
  GatherNorm p{.dtype = dtype_of<A>(),
               .grid_h = grid_h,
               .grid_w = grid_w,
               .side = side,
               .slots = static_cast<int64_t>(patches.size()),
               .channels = channels,
               .patch_of_slot = patches.data(),
               .x = map.data(),
               .weight = weight.data(),
               .bias = bias.data(),
               .eps = 1e-6,
               .out = got.data(),
               .rstd = got_rstd.data()};
  k.gather_norm_forward(p, two_threads());
  const double bound = sizeof(A) == 4 ? 5e-6 : 1e-12;
  check(relative_error(got, y) < bound && relative_error(got_rstd, rstd) < bound, "gathered layer norm", channels);
  k.layer_norm_backward({.dtype = dtype_of<A>(),
                         .rows = rows,
                         .channels = channels,
                         .grad = grad.data(),
                         .x = packed.data(),
                         .rstd = rstd.data(),
                         .weight = weight.data(),
                         .dx = grads.data(),
                         .dweight = dw.data(),
                         .dbias = db.data()},
                        two_threads());
  p.x = grad.data();
  p.z = packed.data();
  p.out = dx.data();
  p.dweight = got_dw.data();
  p.dbias = got_db.data();
  k.gather_norm_backward(p, two_threads());
  std::vector<A> expected(dx.size(), A(7));
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(grads.begin() + r * channels, channels, expected.begin() + place[r] * channels);
  check(relative_error(dx, expected) < bound, "gathered layer norm dx", relative_error(dx, expected));
  check(relative_error(got_dw, dw) < bound && relative_error(got_db, db) < bound, "gathered layer norm dw", channels);
}

// With `offsets` uneven segments, the first of them empty; else so many equal ones that they are summed in groups. Two
// threads take few segments block by block, and one thread takes every segment on its own: the bits are the same.
template <class A>
void test_layer_norm_grn(const KernelTable& k, int64_t channels, bool uneven) {
  Random random(channels + 11);
  const std::vector<int32_t> offsets = {3, 3, 8, 9};
  const int64_t count = uneven ? 3 : 70, per_slot = uneven ? 21 : 1, rows = uneven ? 6 * per_slot : 3 * count;
  const int64_t size = rows * channels;
  const double ln_eps = 1e-6, eps = 1e-3;
  const auto x = random.vector<A>(size), grad = random.vector<A>(size);
  auto weight = random.vector<A>(channels), bias = random.vector<A>(channels);
  const auto gamma = random.vector<A>(channels), beta = random.vector<A>(channels);
  if (channels > 4) weight[3] = bias[3] = 0;  // a channel of zero norm
  const auto segment = [&](int64_t r) { return uneven ? (r / per_slot < 5 ? 1 : 2) : r / 3; };

  std::vector<double> z(size), y(size), norm(count * channels), t(norm), scale(norm), kappa(norm);
  std::vector<double> mean(rows), rstd(rows), out(size), dx(size);
  std::vector<double> dweight(channels), dbias(channels), dgamma(channels), dbeta(channels);
  for (int64_t r = 0; r < rows; ++r) {
    double variance = 0;
    for (int64_t c = 0; c < channels; ++c) mean[r] += x[r * channels + c] / double(channels);
    for (int64_t c = 0; c < channels; ++c) variance += std::pow(x[r * channels + c] - mean[r], 2) / channels;
    rstd[r] = 1 / std::sqrt(variance + ln_eps);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c, at = segment(r) * channels + c;
      z[i] = (x[i] - mean[r]) * rstd[r];
      y[i] = z[i] * weight[c] + bias[c];
      norm[at] += y[i] * y[i];
      t[at] += grad[i] * y[i];
    }
  }
  for (int64_t n = 0; n < count; ++n) {
    double sum = 0, dot = 0;
    for (int64_t i = n * channels; i < (n + 1) * channels; ++i) {
      norm[i] = std::sqrt(norm[i]);
      sum += norm[i];
      dot += gamma[i % channels] * t[i] * norm[i];
    }
    const double m = sum / channels + eps;
    for (int64_t i = n * channels; i < (n + 1) * channels; ++i) {
      const double g = gamma[i % channels];
      scale[i] = 1 + g * norm[i] / m;
      kappa[i] = norm[i] > 0 ? (g * t[i] / m - dot / (channels * m * m)) / norm[i] : 0;
      dgamma[i % channels] += norm[i] / m * t[i];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = segment(r) * channels;
    double d_mean = 0, dz_mean = 0;
    const auto dy = [&](int64_t c) {
      const int64_t i = r * channels + c;
      return grad[i] * scale[at + c] + y[i] * kappa[at + c];
    };
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      out[i] = y[i] * scale[at + c] + beta[c];
      dweight[c] += dy(c) * z[i];
      dbias[c] += dy(c);
      dbeta[c] += grad[i];
      d_mean += dy(c) * weight[c] / channels;
      dz_mean += dy(c) * weight[c] * z[i] / channels;
    }
    for (int64_t c = 0; c < channels; ++c)
      dx[r * channels + c] = rstd[r] * (dy(c) * weight[c] - d_mean - z[r * channels + c] * dz_mean);
  }

  struct Results {
    std::vector<A> y, mean, rstd, norm, dx, dweight, dbias, dgamma, dbeta;
    bool operator==(const Results&) const = default;
  };
  const Segments segments{
      .offsets = uneven ? offsets.data() : nullptr, .rows_per_slot = per_slot, .count = count, .rows = rows};
  const auto run = [&](const Threads& threads) {
    Results got;
    for (auto* rows_of : {&got.y, &got.dx}) rows_of->assign(size, A(NAN));
    for (auto* row : {&got.mean, &got.rstd}) row->assign(rows, A(NAN));
    for (auto* sums : {&got.dweight, &got.dbias, &got.dgamma, &got.dbeta}) sums->assign(channels, A(NAN));
    got.norm.assign(count * channels, A(NAN));
    k.layer_norm_grn_forward({.dtype = dtype_of<A>(),
                              .segments = segments,
                              .channels = channels,
                              .x = x.data(),
                              .ln_weight = weight.data(),
                              .ln_bias = bias.data(),
                              .gamma = gamma.data(),
                              .beta = beta.data(),
                              .ln_eps = ln_eps,
                              .eps = eps,
                              .y = got.y.data(),
                              .mean = got.mean.data(),
                              .rstd = got.rstd.data(),
                              .norm = got.norm.data()},
                             threads);
    k.layer_norm_grn_backward({.dtype = dtype_of<A>(),
                               .segments = segments,
                               .channels = channels,
                               .grad = grad.data(),
                               .x = x.data(),
                               .mean = got.mean.data(),
                               .rstd = got.rstd.data(),
                               .ln_weight = weight.data(),
                               .ln_bias = bias.data(),
                               .gamma = gamma.data(),
                               .norm = got.norm.data(),
                               .eps = eps,
                               .dx = got.dx.data(),
                               .dln_weight = got.dweight.data(),
                               .dln_bias = got.dbias.data(),
                               .dgamma = got.dgamma.data(),
                               .dbeta = got.dbeta.data()},
                              threads);
    return got;
  };
  const Results got = run(one_thread());
  check(got == run(two_threads()), "GRN of layer norm depends on the threads", double(channels));
  const double bound = sizeof(A) == 4 ? 5e-6 : 1e-12;
  const auto compare = [&](const std::vector<A>& values, const std::vector<double>& expected, const char* what) {
    check(relative_error(values, expected) < bound, what, relative_error(values, expected));
  };
  compare(got.y, out, "GRN of layer norm");
  compare(got.norm, norm, "its norm");
  if (channels > 1) compare(got.mean, mean, "its mean");
  if (channels > 1) compare(got.rstd, rstd, "its rstd");
  compare(got.dbeta, dbeta, "its dbeta");
  compare(got.dgamma, dgamma, "its dgamma");
  compare(got.dbias, dbias, "its dbias");
  if (channels == 1) return;  // the exact gradients are 0 up to eps
  compare(got.dweight, dweight, "its dweight");
  check(relative_error(got.dx, dx) < 10 * bound, "its dx", relative_error(got.dx, dx));
}

// Forward and backward together hold less than an eighth of the rows, whether by segments or by blocks of rows.
void test_layer_norm_grn_scratch(const KernelTable& k) {
  const int64_t channels = 64, count = 8, rows = 8192, size = rows * channels;
  Random random(1);
  const auto x = random.vector<float>(size), row = random.vector<float>(channels);
  std::vector<float> y(size), mean(rows), rstd(rows), norm(count * channels), sums(channels);
  const Segments segments{.rows_per_slot = 1, .count = count, .rows = rows};
  for (const Threads& threads : {one_thread(), two_threads(), Threads{8, two_threads().run}}) {
    scratch_bytes = 0;
    k.layer_norm_grn_forward({.dtype = DType::f32,
                              .segments = segments,
                              .channels = channels,
                              .x = x.data(),
                              .ln_weight = row.data(),
                              .ln_bias = row.data(),
                              .gamma = row.data(),
                              .beta = row.data(),
                              .ln_eps = 1e-6,
                              .eps = 1e-6,
                              .y = y.data(),
                              .mean = mean.data(),
                              .rstd = rstd.data(),
                              .norm = norm.data()},
                             threads);
    k.layer_norm_grn_backward({.dtype = DType::f32,
                               .segments = segments,
                               .channels = channels,
                               .grad = x.data(),
                               .x = x.data(),
                               .mean = mean.data(),
                               .rstd = rstd.data(),
                               .ln_weight = row.data(),
                               .ln_bias = row.data(),
                               .gamma = row.data(),
                               .norm = norm.data(),
                               .eps = 1e-6,
                               .dx = y.data(),
                               .dln_weight = sums.data(),
                               .dln_bias = sums.data(),
                               .dgamma = sums.data(),
                               .dbeta = sums.data()},
                              threads);
    const size_t bytes = scratch_bytes;
    check(bytes > 0 && bytes < size * sizeof(float) / 8, "scratch memory of GRN of layer norm", double(bytes));
  }
}

}  // namespace

int main() {
  return on_every_isa([](const KernelTable& k) {
    test_layer_norm_grn_scratch(k);
    for (Activation act : {Activation::gelu, Activation::gelu_tanh}) {
      test_gelu<float>(k, act, 1.5e-7);
      test_gelu<double>(k, act, 4e-16);
    }
    for (Activation act : {Activation::identity, Activation::gelu, Activation::gelu_tanh}) {
      for (int64_t channels : {1, 5, 16, 40, 67, 130}) {
        test_mlp<float>(k, channels, act);
        test_mlp<double>(k, channels, act);
      }
    }
    for (int64_t channels : {1, 5, 16, 40, 67, 130}) {
      test_layer_norm<float>(k, channels);
      test_layer_norm<double>(k, channels);
      test_gather_norm<float>(k, channels);
      test_gather_norm<double>(k, channels);
      for (bool uneven : {true, false}) {
        test_layer_norm_grn<float>(k, channels, uneven);
        test_layer_norm_grn<double>(k, channels, uneven);
      }
    }
  });
}
