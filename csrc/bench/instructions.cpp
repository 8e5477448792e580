// Calls every CPU kernel once on fixed data, so that bench/gate/instructions.py can count its instructions under
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
constexpr size_t kKernels = 17;
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
  const ConvGeometry g{
      .maps = maps, .height = side, .width = side, .channels = channels, .kernel_size = kernel, .neighbours = table};
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
    k.conv_forward({.dtype = dtype, .geometry = g, .x = x, .weight = weight, .bias = bias, .y = y}, one_thread());
  });
  count("conv_forward, input gradient, " + shape, [&] {
    k.conv_forward(
        {.dtype = dtype, .geometry = g, .x = x, .weight = weight, .residual = residual, .flip = true, .y = y},
        one_thread());
  });
  count("conv_forward, normalized, " + shape, [&] {
    k.conv_forward({.dtype = dtype,
                    .geometry = g,
                    .x = x,
                    .weight = weight,
                    .bias = bias,
                    .y = y,
                    .normalize = true,
                    .ln_weight = gain,
                    .ln_bias = bias,
                    .eps = 1e-6,
                    .rstd = rstd},
                   one_thread());
  });
  count("conv_weight_grad " + shape, [&] {
    k.conv_weight_grad({.dtype = dtype, .geometry = g, .x = x, .grad = residual, .dweight = dweight, .dbias = dbias},
                       one_thread());
  });
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
  count("layer_norm_forward " + shape, [&] {
    k.layer_norm_forward({.dtype = dtype,
                          .rows = rows,
                          .channels = channels,
                          .x = x,
                          .weight = weight,
                          .bias = bias,
                          .eps = 1e-6,
                          .y = y,
                          .mean = mean,
                          .rstd = rstd},
                         one_thread());
  });
  count("layer_norm_backward " + shape, [&] {
    k.layer_norm_backward({.dtype = dtype,
                           .rows = rows,
                           .channels = channels,
                           .grad = grad,
                           .x = x,
                           .mean = mean,
                           .rstd = rstd,
                           .weight = weight,
                           .dx = dx,
                           .dweight = dweight,
                           .dbias = dbias},
                          one_thread());
  });
  SpaceToDepthNorm p{.dtype = dtype,
                     .maps = maps,
                     .height = side,
                     .width = side,
                     .channels = channels,
                     .x = x,
                     .weight = weight,
                     .bias = bias,
                     .eps = 1e-6,
                     .out = y,
                     .rstd = rstd};
  count("space_to_depth_norm_forward " + shape, [&] { k.space_to_depth_norm_forward(p, one_thread()); });
  p.x = grad;
  p.bias = nullptr;
  p.z = y;
  p.out = dx;
  p.dweight = dweight;
  p.dbias = dbias;
  count("space_to_depth_norm_backward " + shape, [&] { k.space_to_depth_norm_backward(p, one_thread()); });
}

template <class T>
void count_gathered_norm(const KernelTable& k, int64_t channels) {
  using A = typename Element<T>::Acc;
  Data data;
  const Layout layout;
  const int64_t side = 4, rows = kSlots * side * side, size = rows * channels;
  T* map = data.draw<T>(kImages * kSide * kSide * side * side * channels);
  T* packed = data.draw<T>(size);
  GatherNorm p{.dtype = Element<T>::dtype,
               .grid_h = kSide,
               .grid_w = kSide,
               .side = side,
               .slots = kSlots,
               .channels = channels,
               .patch_of_slot = data.indices(layout.patch_of_slot),
               .x = map,
               .weight = data.draw<A>(channels, 1),
               .bias = data.draw<A>(channels),
               .eps = 1e-6,
               .out = packed,
               .rstd = data.blank<A>(rows)};
  const std::string shape = std::string(Element<T>::name) + " C=" + std::to_string(channels);
  count("gather_norm_forward " + shape, [&] { k.gather_norm_forward(p, one_thread()); });
  p.x = data.draw<T>(size);
  p.bias = nullptr;
  p.z = packed;
  p.out = map;
  p.dweight = data.blank<A>(channels);
  p.dbias = data.blank<A>(channels);
  count("gather_norm_backward " + shape, [&] { k.gather_norm_backward(p, one_thread()); });
}

template <class T>
void count_mlp(const KernelTable& k, int64_t hidden) {
  using A = typename Element<T>::Acc;
  constexpr DType dtype = Element<T>::dtype;
  Data data;
  const Layout layout;
  const bool exact = dtype == DType::f64;
  const int64_t per_slot = exact ? 4 : 16, rows = kSlots * per_slot, size = rows * hidden;
  const Segments segments{
      .offsets = data.indices(layout.offsets), .rows_per_slot = per_slot, .count = kImages, .rows = rows};
  const T *x = data.draw<T>(size), *grad = data.draw<T>(size);
  const A *gamma = data.draw<A>(hidden), *beta = data.draw<A>(hidden);
  const A *scale = data.draw<A>(kImages * hidden, 1), *kappa = data.draw<A>(kImages * hidden);
  A *norm = data.draw<A>(kImages * hidden, 2), *sums = data.blank<A>(hidden);
  A *norms = data.blank<A>(kImages * hidden), *factors = data.blank<A>(kImages * hidden);
  A* pulls = data.blank<A>(kImages * hidden);
  A *dgamma = data.blank<A>(hidden), *dbeta = data.blank<A>(hidden);
  T* y = data.blank<T>(size);
  const std::string shape = std::string(Element<T>::name) + " H=" + std::to_string(hidden);
  for (bool gelu : {false, true}) {
    const Work work = exact && gelu ? Work::c_library : Work::own;
    const std::string what = (gelu ? ", gelu, " : " ") + shape;
    count(
        "grn_forward" + what,
        [&] {
          k.grn_forward({.dtype = dtype,
                         .segments = segments,
                         .channels = hidden,
                         .gelu = gelu,
                         .x = x,
                         .gamma = gamma,
                         .beta = beta,
                         .eps = 1e-6,
                         .y = y,
                         .norm = norm},
                        one_thread());
        },
        work);
    count(
        "grn_backward" + what,
        [&] {
          k.grn_backward({.dtype = dtype,
                          .segments = segments,
                          .channels = hidden,
                          .gelu = gelu,
                          .grad = grad,
                          .x = x,
                          .gamma = gamma,
                          .norm = norm,
                          .eps = 1e-6,
                          .dx = y,
                          .dgamma = dgamma,
                          .dbeta = dbeta},
                         one_thread());
        },
        work);
  }
  T* dx = data.blank<T>(size);
  A *mean = data.blank<A>(rows), *rstd = data.blank<A>(rows);
  A *dweight = data.blank<A>(hidden), *dbias = data.blank<A>(hidden);
  count("layer_norm_grn_forward " + shape, [&] {
    k.layer_norm_grn_forward({.dtype = dtype,
                              .segments = segments,
                              .channels = hidden,
                              .x = x,
                              .ln_weight = gamma,
                              .ln_bias = beta,
                              .gamma = beta,
                              .beta = gamma,
                              .ln_eps = 1e-6,
                              .eps = 1e-6,
                              .y = y,
                              .mean = mean,
                              .rstd = rstd,
                              .norm = norm},
                             one_thread());
  });
  count("layer_norm_grn_backward " + shape, [&] {
    k.layer_norm_grn_backward({.dtype = dtype,
                               .segments = segments,
                               .channels = hidden,
                               .grad = grad,
                               .x = x,
                               .mean = mean,
                               .rstd = rstd,
                               .ln_weight = gamma,
                               .ln_bias = beta,
                               .gamma = beta,
                               .norm = norm,
                               .eps = 1e-6,
                               .dx = dx,
                               .dln_weight = dweight,
                               .dln_bias = dbias,
                               .dgamma = dgamma,
                               .dbeta = dbeta},
                              one_thread());
  });
  const Work work = exact ? Work::c_library : Work::own;
  for (Activation act : {Activation::gelu, Activation::gelu_tanh}) {
    const std::string what = (act == Activation::gelu ? ", gelu, " : ", gelu_tanh, ") + shape;
    // in place, as the schedule calls them: copies, so that every kernel starts from what was drawn
    T *a = data.draw<T>(size), *ds = data.draw<T>(size);
    const GeluStatistics statistics{.dtype = dtype,
                                    .segments = segments,
                                    .channels = hidden,
                                    .activation = act,
                                    .a = a,
                                    .h = a,
                                    .gamma = gamma,
                                    .eps = 1e-6,
                                    .norm = norms,
                                    .scale = factors};
    count("gelu_statistics" + what, [&] { k.gelu_statistics(statistics, one_thread()); }, work);
    const MlpBackwardStatistics backward{.dtype = dtype,
                                         .segments = segments,
                                         .channels = hidden,
                                         .activation = act,
                                         .a = a,
                                         .ds = ds,
                                         .norm = norm,
                                         .gamma = gamma,
                                         .eps = 1e-6,
                                         .scale = factors,
                                         .kappa = pulls,
                                         .dgamma = dgamma};
    count("mlp_backward_statistics" + what, [&] { k.mlp_backward_statistics(backward, one_thread()); }, work);
    const MlpBackwardPointwise pointwise{.dtype = dtype,
                                         .segments = segments,
                                         .channels = hidden,
                                         .activation = act,
                                         .a = a,
                                         .ds = ds,
                                         .scale = scale,
                                         .kappa = kappa,
                                         .beta = beta,
                                         .hs = a,
                                         .da = ds,
                                         .db = sums};
    count("mlp_backward_pointwise" + what, [&] { k.mlp_backward_pointwise(pointwise, one_thread()); }, work);
    if (act == Activation::gelu_tanh) continue;  // without an activation
    const GeluScale scaled{.dtype = dtype,
                           .segments = segments,
                           .channels = hidden,
                           .activation = Activation::identity,
                           .a = a,
                           .scale = scale,
                           .beta = beta,
                           .out = a};
    count("gelu_scale, of activated rows, " + shape, [&] { k.gelu_scale(scaled, one_thread()); });
    const ColumnSum columns{.dtype = dtype, .rows = rows, .channels = hidden, .x = a, .sums = sums};
    count("column_sum " + shape, [&] { k.column_sum(columns, one_thread()); });
  }
}

void count_copies() {
  Data data;
  const Layout layout;
  const int64_t side = 8, channels = 40, pixels = kImages * kSide * kSide * side * side, pixel = 4 * channels;
  const int32_t *patches = data.indices(layout.patch_of_slot), *slots = data.indices(layout.slot_of_patch);
  float *dense = data.draw<float>(pixels * channels), *packed = data.draw<float>(kSlots * side * side * channels);
  const float* fill = data.draw<float>(channels);
  const PatchCopy gather{.images = kImages,
                         .grid_h = kSide,
                         .grid_w = kSide,
                         .side = side,
                         .slots = kSlots,
                         .pixel_bytes = pixel,
                         .patch_of_slot = patches,
                         .slot_of_patch = slots,
                         .source = dense,
                         .target = packed};
  count("gather_patches float32", [&] { gather_patches(gather, one_thread()); }, Work::c_library);
  for (bool filled : {false, true}) {
    const PatchCopy p{.images = kImages,
                      .grid_h = kSide,
                      .grid_w = kSide,
                      .side = side,
                      .slots = kSlots,
                      .pixel_bytes = pixel,
                      .patch_of_slot = patches,
                      .slot_of_patch = slots,
                      .source = packed,
                      .fill = filled ? fill : nullptr,
                      .target = dense};
    count(
        filled ? "scatter_patches, filled, float32" : "scatter_patches float32",
        [&] { scatter_patches(p, one_thread()); }, Work::c_library);
  }
  const int64_t height = kSide * side * 4;
  const float* images = data.draw<float>(kImages * 3 * height * height);
  float* rows = data.blank<float>(kSlots * side * side * 48);
  count(
      "patch_pixels float32",
      [&] {
        patch_pixels({.channels = 3,
                      .height = height,
                      .width = height,
                      .grid_h = kSide,
                      .grid_w = kSide,
                      .side = side,
                      .slots = kSlots,
                      .element_bytes = 4,
                      .patch_of_slot = patches,
                      .images = images,
                      .rows = rows},
                     one_thread());
      },
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
  count_gathered_norm<float>(*k, 80);
  count_norms<double>(*k, 80);
  count_gathered_norm<double>(*k, 80);
  count_norms<Bfloat16>(*k, 80);
  count_gathered_norm<Bfloat16>(*k, 80);
  count_mlp<float>(*k, 160);
  count_mlp<double>(*k, 160);
  count_mlp<Bfloat16>(*k, 160);
  count_copies();
  return 0;
}
