// The kernels as large as the MLP's weights, under the emulation, against plain loops.
#include <cstdio>

#include "cuda_buffers.h"

namespace {

using namespace test;

template <class T, class P>
void test_parameters(int64_t inputs, int64_t hidden, int64_t outputs, bool fold, bool copy) {
  using A = Acc<T>;
  Random random(1);
  Buffer<P> w1(hidden * inputs), w2(outputs * hidden);
  Buffer<A> b1(hidden), b2(outputs), beta(hidden), gain(inputs), shift(inputs);
  w1.random(random);
  w2.random(random);
  for (auto* b : {&b1, &b2, &beta, &gain, &shift}) b->random(random);
  std::vector<double> w1_expected(hidden * inputs), b1_expected(hidden), w2_expected(outputs * hidden),
      b2_expected(outputs);
  for (int64_t j = 0; j < hidden; ++j) {
    b1_expected[j] = b1[j];
    for (int64_t c = 0; c < inputs; ++c) {
      const double w = value(w1[j * inputs + c]);
      w1_expected[j * inputs + c] = fold ? w * gain[c] : w;
      if (fold) b1_expected[j] += w * shift[c];
    }
  }
  for (int64_t o = 0; o < outputs; ++o) {
    b2_expected[o] = b2[o];
    for (int64_t j = 0; j < hidden; ++j) {
      w2_expected[o * hidden + j] = value(w2[o * hidden + j]);
      b2_expected[o] += value(w2[o * hidden + j]) * beta[j];
    }
  }
  Buffer<T> w1_out(hidden * inputs), b1_out(hidden), w2_out(outputs * hidden), b2_out(outputs);
  MlpParameters p{};
  p.dtype = kDType<T>;
  p.wide = std::is_same<P, A>::value;
  p.inputs = inputs;
  p.hidden = hidden;
  p.outputs = outputs;
  p.w1 = w1.data();
  p.b1 = b1.data();
  p.w2 = w2.data();
  p.b2 = b2.data();
  p.beta = beta.data();
  p.ln_weight = fold ? gain.data() : nullptr;
  p.ln_bias = fold ? shift.data() : nullptr;
  p.w1_out = copy ? w1_out.data() : nullptr;
  p.b1_out = b1_out.data();
  p.w2_out = copy ? w2_out.data() : nullptr;
  p.b2_out = b2_out.data();
  RUN(mlp_parameters, p);
  if (copy) {
    compare(w1_out, w1_expected, kRounding<T>, "w1");
    compare(w2_out, w2_expected, kRounding<T>, "w2");
  }
  compare(b1_out, b1_expected, kRounding<T>, "b1");
  compare(b2_out, b2_expected, kRounding<T>, "b2");

  if (!fold) return;
  Buffer<A> dw1(hidden * inputs), db1(hidden), dgain(inputs), dshift(inputs);
  dw1.random(random);
  db1.random(random);
  std::vector<double> dw1_expected(hidden * inputs), dgain_expected(inputs), dshift_expected(inputs);
  for (int64_t j = 0; j < hidden; ++j)
    for (int64_t c = 0; c < inputs; ++c) {
      const double w = value(w1[j * inputs + c]), d = dw1[j * inputs + c];
      dgain_expected[c] += w * d;
      dshift_expected[c] += w * db1[j];
      dw1_expected[j * inputs + c] = d * gain[c] + double(db1[j]) * shift[c];
    }
  RUN(unfold_layer_norm, (UnfoldLayerNorm{.dtype = kDType<P>,
                                          .inputs = inputs,
                                          .hidden = hidden,
                                          .w1 = w1.data(),
                                          .ln_weight = gain.data(),
                                          .ln_bias = shift.data(),
                                          .db1 = db1.data(),
                                          .dw1 = dw1.data(),
                                          .dln_weight = dgain.data(),
                                          .dln_bias = dshift.data()}));
  compare(dw1, dw1_expected, kRounding<A>, "dw1");
  compare(dgain, dgain_expected, 4 * kRounding<A>, "gradient of LN's weight");
  compare(dshift, dshift_expected, 4 * kRounding<A>, "gradient of LN's bias");
}

template <class T>
void test_products(int64_t images, int64_t outputs, int64_t hidden) {
  using A = Acc<T>;
  Random random(2);
  Buffer<A> g(images * outputs * hidden), scale(images * hidden), d_sum(outputs), beta(hidden);
  Buffer<T> w2(outputs * hidden);
  for (auto* b : {&g, &scale, &d_sum, &beta}) b->random(random);
  w2.random(random);
  std::vector<double> t_expected(images * hidden), dw2_expected(outputs * hidden);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t h = 0; h < hidden; ++h) {
      dw2_expected[o * hidden + h] = double(d_sum[o]) * beta[h];
      for (int64_t n = 0; n < images; ++n) {
        const double product = g[(n * outputs + o) * hidden + h];
        t_expected[n * hidden + h] += product * value(w2[o * hidden + h]);
        dw2_expected[o * hidden + h] += product * scale[n * hidden + h];
      }
    }
  Buffer<A> t(images * hidden), dw2(outputs * hidden);
  ImageProducts p{.dtype = kDType<T>,
                  .images = images,
                  .outputs = outputs,
                  .hidden = hidden,
                  .g = g.data(),
                  .w2 = w2.data(),
                  .t = t.data(),
                  .scale = scale.data(),
                  .d_sum = d_sum.data(),
                  .beta = beta.data(),
                  .dw2 = dw2.data()};
  RUN(products_reduce, p);
  p.dtype = kDType<A>;
  RUN(products_weight, p);
  compare(t, t_expected, 4 * kRounding<A>, "t");
  compare(dw2, dw2_expected, 4 * kRounding<A>, "dw2");
}

template <class T>
void test_type() {
  for (bool fold : {false, true}) {
    test_parameters<T, Acc<T>>(5, 13, 7, fold, true);
    test_parameters<T, T>(40, 160, 40, fold, true);
    test_parameters<T, T>(33, 130, 1, fold, false);
  }
  test_products<T>(3, 5, 13);
  test_products<T>(1, 40, 300);
  test_products<T>(0, 4, 6);
}

}  // namespace

int main() {
  return on_every_type([](auto type, const char*) { test_type<decltype(type)>(); });
}
