// Calls every CPU kernel once on fixed data, so that bench/regression_gate.py can count its instructions under
// callgrind.
//
//   instructions [avx2 | baseline | avx512]
//
// Prints how it was compiled, then one line per counted call, in order. A counted call is one of cnx_counted_call,
// which callgrind is told to collect and to dump; each kernel runs once before it is counted, as its first call
// resolves the functions of the C library.
#include <functional>
#include <string>

#include "fixed_data.h"

using namespace cnx;
using namespace test;

extern "C" __attribute__((noinline)) void cnx_counted_call(const std::function<void()>& call) {
  call();
}

namespace {

// A name, two words of which the second is the vector width, and every kernel.
constexpr size_t kKernels = 15;
static_assert(sizeof(KernelTable) == (2 + kKernels) * sizeof(void*), "a kernel was added: it needs a count() below");

// Kernels that spend most of their time in functions of the C library (memcpy, erfc, exp) depend on its version too.
enum class Work { own, c_library };

void count(const std::string& name, const std::function<void()>& call, Work work = Work::own) {
  call();
  cnx_counted_call(call);
  std::printf("%s %s\n", work == Work::own ? "call" : "call-c-library", name.c_str());
}

// `side` sites along a patch, or along a dense map of kImages images when `packed` is false.
template <class T>
void count_conv(const KernelTable& k, int64_t side, int64_t channels, bool packed) {
  using A = typename Element<T>::Acc;
  constexpr DType dtype = Element<T>::dtype;
  Data data;
  const Layout layout;
  const int kernel = 7;
  const int64_t maps = packed ? kSlots : kImages, rows = maps * side * side, size = rows * channels;
  const int reach = int((kernel / 2 + side - 1) / side);
  const int32_t* table = packed ? data.indices(layout.neighbours(reach)) : nullptr;
  const ConvGeometry g{maps, side, side, channels, kernel, table};
  const T* x = data.draw<T>(size);
  const T* residual = data.draw<T>(size);
  const A* weight = data.draw<A>(channels * kernel * kernel);
  const A* bias = data.draw<A>(channels);
  const A* gain = data.draw<A>(channels, 1);
  T* y = data.blank<T>(size);
  A *rstd = data.blank<A>(rows), *dweight = data.blank<A>(channels * kernel * kernel), *dbias = data.blank<A>(channels);
  const std::string shape = std::string(Element<T>::name) + (packed ? " patches s=" : " dense map s=") +
                            std::to_string(side) + " C=" + std::to_string(channels);
  count("conv_forward " + shape, [&] {
    k.conv_forward({dtype, g, x, weight, bias, nullptr, false, y, false, nullptr, nullptr, 0, nullptr}, one_thread());
  });
  count("conv_forward, input gradient, " + shape, [&] {
    k.conv_forward({dtype, g, x, weight, nullptr, residual, true, y, false, nullptr, nullptr, 0, nullptr},
                   one_thread());
  });
  count("conv_forward, normalized, " + shape, [&] {
    k.conv_forward({dtype, g, x, weight, bias, nullptr, false, y, true, gain, bias, 1e-6, rstd}, one_thread());
  });
  count("conv_weight_grad " + shape,
        [&] { k.conv_weight_grad({dtype, g, x, residual, dweight, dbias}, one_thread()); });
}

template <class T>
void count_norms(const KernelTable& k, int64_t channels) {
  using A = typename Element<T>::Acc;
  constexpr DType dtype = Element<T>::dtype;
  Data data;
  const int64_t maps = 4, side = 4, rows = maps * side * side, size = rows * channels;
  const T *x = data.draw<T>(size), *grad = data.draw<T>(size);
  const A *weight = data.draw<A>(channels, 1), *bias = data.draw<A>(channels);
  T *y = data.blank<T>(size), *dx = data.blank<T>(size);
  A *mean = data.blank<A>(rows), *rstd = data.blank<A>(rows);
  A *dweight = data.blank<A>(channels), *dbias = data.blank<A>(channels);
  const std::string shape = std::string(Element<T>::name) + " C=" + std::to_string(channels);
  count("layer_norm_forward " + shape,
        [&] { k.layer_norm_forward({dtype, rows, channels, x, weight, bias, 1e-6, y, mean, rstd}, one_thread()); });
  count("layer_norm_backward " + shape, [&] {
    k.layer_norm_backward({dtype, rows, channels, grad, x, mean, rstd, weight, dx, dweight, dbias}, one_thread());
  });
  SpaceToDepthNorm p{dtype, maps, side, side, channels, x, weight, bias, 1e-6, nullptr, y, rstd, nullptr, nullptr};
  count("space_to_depth_norm_forward " + shape, [&] { k.space_to_depth_norm_forward(p, one_thread()); });
  p = {dtype, maps, side, side, channels, grad, weight, nullptr, 1e-6, y, dx, rstd, dweight, dbias};
  count("space_to_depth_norm_backward " + shape, [&] { k.space_to_depth_norm_backward(p, one_thread()); });
}

template <class T>
void count_mlp(const KernelTable& k, int64_t hidden) {
  using A = typename Element<T>::Acc;
  constexpr DType dtype = Element<T>::dtype;
  Data data;
  const Layout layout;
  const bool exact = dtype == DType::f64;
  const int64_t per_slot = exact ? 4 : 16, rows = kSlots * per_slot, size = rows * hidden;
  const Segments segments{data.indices(layout.offsets), per_slot, kImages, rows};
  const T *x = data.draw<T>(size), *grad = data.draw<T>(size);
  const A *gamma = data.draw<A>(hidden), *beta = data.draw<A>(hidden);
  const A *scale = data.draw<A>(kImages * hidden, 1), *kappa = data.draw<A>(kImages * hidden);
  A *norm = data.draw<A>(kImages * hidden, 2), *sums = data.blank<A>(kImages * hidden);
  A *dgamma = data.blank<A>(hidden), *dbeta = data.blank<A>(hidden);
  T* y = data.blank<T>(size);
  const std::string shape = std::string(Element<T>::name) + " H=" + std::to_string(hidden);
  for (bool gelu : {false, true}) {
    const Work work = exact && gelu ? Work::c_library : Work::own;
    const std::string what = (gelu ? ", gelu, " : " ") + shape;
    count(
        "grn_forward" + what,
        [&] { k.grn_forward({dtype, segments, hidden, gelu, x, gamma, beta, 1e-6, y, norm}, one_thread()); }, work);
    count(
        "grn_backward" + what,
        [&] {
          k.grn_backward({dtype, segments, hidden, gelu, grad, x, gamma, norm, 1e-6, y, dgamma, dbeta}, one_thread());
        },
        work);
  }
  const Work work = exact ? Work::c_library : Work::own;
  for (Activation act : {Activation::gelu, Activation::gelu_tanh}) {
    const std::string what = (act == Activation::gelu ? ", gelu, " : ", gelu_tanh, ") + shape;
    // written in place: copies, so that every kernel starts from what was drawn
    MlpRows p{dtype, segments, hidden, act, data.draw<T>(size), data.draw<T>(size), scale, kappa, beta, sums};
    count("gelu_square_sum" + what, [&] { k.gelu_square_sum(p, one_thread()); }, work);
    count("mlp_backward_reduce" + what, [&] { k.mlp_backward_reduce(p, one_thread()); }, work);
    count("mlp_backward_pointwise" + what, [&] { k.mlp_backward_pointwise(p, one_thread()); }, work);
    if (act == Activation::gelu_tanh) continue;  // without an activation
    count("scale_rows " + shape, [&] { k.scale_rows(p, one_thread()); });
    count("column_sum " + shape, [&] { k.column_sum(p, one_thread()); });
  }
  if (dtype == DType::bf16) return;  // statistics are of the accumulator type
  A *out = data.blank<A>(kImages * hidden), *factors = data.blank<A>(kImages * hidden);
  count("grn_scale " + shape,
        [&] { k.grn_scale({dtype, kImages, hidden, norm, nullptr, gamma, 1e-6, out, factors, nullptr, nullptr}); });
  count("grn_gradient " + shape,
        [&] { k.grn_gradient({dtype, kImages, hidden, scale, norm, gamma, 1e-6, nullptr, nullptr, factors, dgamma}); });
}

void count_copies() {
  Data data;
  const Layout layout;
  const int64_t side = 8, channels = 40, pixels = kImages * kSide * kSide * side * side, pixel = 4 * channels;
  const int32_t *patches = data.indices(layout.patch_of_slot), *slots = data.indices(layout.slot_of_patch);
  float *dense = data.draw<float>(pixels * channels), *packed = data.draw<float>(kSlots * side * side * channels);
  const float* fill = data.draw<float>(channels);
  const PatchCopy gather{kImages, kSide, kSide, side, kSlots, pixel, patches, slots, dense, nullptr, packed};
  count("gather_patches float32", [&] { gather_patches(gather, one_thread()); }, Work::c_library);
  for (bool filled : {false, true}) {
    const PatchCopy p{kImages, kSide, kSide, side, kSlots, pixel, patches, slots, packed, filled ? fill : nullptr,
                      dense};
    count(
        filled ? "scatter_patches, filled, float32" : "scatter_patches float32",
        [&] { scatter_patches(p, one_thread()); }, Work::c_library);
  }
  const int64_t height = kSide * side * 4;
  const float* images = data.draw<float>(kImages * 3 * height * height);
  float* rows = data.blank<float>(kSlots * side * side * 48);
  count(
      "patch_pixels float32",
      [&] { patch_pixels({3, height, height, kSide, kSide, side, kSlots, 4, patches, images, rows}, one_thread()); },
      Work::c_library);
  count("transpose_f32", [&] { transpose_f32(dense, 100, 67, packed, one_thread()); });
}

}  // namespace

int main(int argc, char** argv) {
  const char* isa = argc > 1 ? argv[1] : "baseline";
  const KernelTable* k = find_kernels(isa);
  if (!k) {
    std::fprintf(stderr, "'%s' is not an instruction set of this processor\n", isa);
    return 2;
  }
#if defined(__clang__)
  std::printf("compiler clang %d.%d.%d\n", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
  std::printf("compiler gcc %d.%d.%d\n", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__)
  std::printf("build optimized\n");
#else
  std::printf("build for debugging\n");
#endif
  std::printf("isa %s\n", k->name);
  // The four stages of atto: patches of 8, 4, 2 and 1 sites along a side.
  for (int stage = 0; stage < 4; ++stage) {
    count_conv<float>(*k, 8 >> stage, 40 << stage, true);
    count_conv<Bfloat16>(*k, 8 >> stage, 40 << stage, true);
  }
  count_conv<double>(*k, 8, 40, true);
  count_conv<float>(*k, 14, 40, false);
  count_norms<float>(*k, 80);
  count_norms<double>(*k, 80);
  count_norms<Bfloat16>(*k, 80);
  count_mlp<float>(*k, 160);
  count_mlp<double>(*k, 160);
  count_mlp<Bfloat16>(*k, 160);
  count_copies();
  return 0;
}
