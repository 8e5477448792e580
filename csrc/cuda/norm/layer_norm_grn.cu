// GRN of LayerNorm, y = (z weight + bias) scale + beta, z = (x - mean) rstd: two passes over x each way, of which only
// statistics remain. Forward: mean, 1/std and square sums (2 bytes per 16-bit element, 14 instructions of the 14 that
// an H200 issues meanwhile at its copy bandwidth), result (4 bytes, 9 of 28). Backward: sums of grad z, grad, z z and
// z, from which all gradients of parameters follow (4 bytes, 12 of 28), gradient (6 bytes, 27 of 42).
#include "../mlp/row_passes.h"
#include "grn_statistics.cuh"
#include "normalized.cuh"

namespace cnx {
namespace cuda {
namespace {

// From the sums A of grad z, B of grad, S2 of z z and S1 of z: the coefficients of pulled() [count, 3, channels], and
// the segment's terms of the gradients, `stride` apart: of weight and bias [2, channels], and of gamma and beta
// likewise. With t = sum of grad y = weight A + bias B, scale and kappa are those of grn_gradient_kernel.
template <class A>
struct GradientTerms {
  A* coefficients;
  A *dweight, *dbias, *dgamma, *dbeta;
  int64_t stride;
};

template <class A>
__global__ void __launch_bounds__(kStatisticsThreads, 1)
    layer_norm_grn_gradient_kernel(const A* partial, int64_t splits, Segments segments, int64_t channels,
                                   const A* weight, const A* bias, const A* gamma, const A* norm, A eps,
                                   GradientTerms<A> out) {
  __shared__ A shared[32];
  const int64_t segment = blockIdx.x;
  const A rows = static_cast<A>(segments.begin(segment + 1) - segments.begin(segment));
  partial += segment * splits * 4 * channels;
  norm += segment * channels;
  A* slope = out.coefficients + segment * 3 * channels;
  A *dweight = out.dweight + segment * out.stride, *dbias = out.dbias + segment * out.stride;
  A *dgamma = out.dgamma + segment * out.stride, *dbeta = out.dbeta + segment * out.stride;
  A sum = 0, dot = 0;
  for (int64_t c = threadIdx.x; c < channels; c += kStatisticsThreads) {
    const A of_z = split_sum(partial, splits, 4 * channels, c),
            of_one = split_sum(partial, splits, 4 * channels, channels + c);
    const A t = weight[c] * of_z + bias[c] * of_one;
    sum += norm[c];
    dot += gamma[c] * t * norm[c];
    dweight[c] = of_z;  // kept by this thread until the means are known
    dbeta[c] = of_one;
    dgamma[c] = split_sum(partial, splits, 4 * channels, 2 * channels + c);
    dbias[c] = split_sum(partial, splits, 4 * channels, 3 * channels + c);
  }
  const A mean = block_sum(sum, shared) / static_cast<A>(channels) + eps;
  const A inverse = A(1) / mean, pull = block_sum(dot, shared) / static_cast<A>(channels) * inverse * inverse;
  for (int64_t c = threadIdx.x; c < channels; c += kStatisticsThreads) {
    const A of_z = dweight[c], of_one = dbeta[c], squares = dgamma[c], sums = dbias[c], w = weight[c], b = bias[c];
    const A t = w * of_z + b * of_one, value = norm[c], response = value * inverse;
    const A scale = A(1) + gamma[c] * response;
    const A kappa = value != A(0) ? (gamma[c] * t * inverse - pull) / value : A(0);
    dgamma[c] = response * t;
    dweight[c] = scale * of_z + kappa * (w * squares + b * sums);
    dbias[c] = scale * of_one + kappa * (w * sums + b * rows);
    slope[c] = scale * w;
    slope[channels + c] = kappa * w * w;
    slope[2 * channels + c] = kappa * w * b;
  }
}

template <class T>
int64_t forward_splits(const Segments& segments, int64_t channels) {
  return channels <= kMostHeld ? row_splits<T>(segments, channels) : column_splits<T>(segments, channels);
}

template <class T>
struct ForwardScratch {
  Workspace space;
  Partials<Acc<T>> squares;
  Acc<T>* scale;

  ForwardScratch(const LayerNormGrnForward& p, void* base)
      : space(base),
        squares(space, p.segments.count, forward_splits<T>(p.segments, p.channels), p.channels),
        scale(space.take<Acc<T>>(p.segments.count * p.channels)) {}
};

template <class T>
struct BackwardScratch {
  Workspace space;
  Partials<Acc<T>> sums;
  Acc<T>*coefficients, *of_norm, *of_response;  // terms of LayerNorm's parameters and of GRN's

  BackwardScratch(const LayerNormGrnBackward& p, void* base)
      : space(base),
        sums(space, p.segments.count, column_splits<T>(p.segments, p.channels), 4 * p.channels),
        coefficients(space.take<Acc<T>>(p.segments.count * 3 * p.channels)),
        of_norm(space.take<Acc<T>>(p.segments.count * 2 * p.channels)),
        of_response(space.take<Acc<T>>(p.segments.count * 2 * p.channels)) {}
};

// Statistics of the rows and the sums of squares of their normalised form. Rows that nothing holds leave it in y.
template <class T, int N>
void statistics(const LayerNormGrnForward& p, const NormForward<T>& rows, Acc<T>* squares, const Launch& launch) {
  if (p.channels > kMostHeld) {
    layer_norm_forward({.dtype = p.dtype,
                        .rows = p.segments.rows,
                        .channels = p.channels,
                        .x = p.x,
                        .weight = p.ln_weight,
                        .bias = p.ln_bias,
                        .eps = p.ln_eps,
                        .y = p.y,
                        .mean = p.mean,
                        .rstd = p.rstd},
                       launch);
    square_sums({.dtype = p.dtype,
                 .segments = p.segments,
                 .channels = p.channels,
                 .activation = Activation::identity,
                 .a = p.y},
                squares, launch);
    return;
  }
  with_held_rows<T, N>(p.segments, p.channels, row_splits<T>(p.segments, p.channels), [&](auto held, ColumnGrid grid) {
    constexpr bool kBlock = decltype(held)::value;
    CNX_LAUNCH((normalized_squares_kernel<T, N, kBlock>), grid.blocks(), kRowThreads, 0, launch, grid, rows, squares);
  });
}

template <class T, int N>
void gradient(const LayerNormGrnBackward& p, const NormBackward<T>& rows, const Acc<T>* coefficients,
              const Launch& launch) {
  if (p.segments.rows == 0) return;
  if (p.channels > kMostHeld) {
    const ColumnGrid grid = column_grid<T>(p.segments, p.channels, N);
    CNX_LAUNCH((normalized_pull_kernel<T, N>), grid.blocks(), kColumnThreads, 0, launch, grid, rows, coefficients);
    layer_norm_backward({.dtype = p.dtype,
                         .rows = p.segments.rows,
                         .channels = p.channels,
                         .grad = p.dx,
                         .x = p.x,
                         .mean = p.mean,
                         .rstd = p.rstd,
                         .dx = p.dx},
                        launch);
    return;
  }
  const int64_t splits = split_count(p.segments, 4 * row_groups<T>(p.channels));
  with_held_rows<T, N>(p.segments, p.channels, splits, [&](auto held, ColumnGrid grid) {
    constexpr bool kBlock = decltype(held)::value;
    CNX_LAUNCH((normalized_gradient_kernel<T, N, kBlock>), grid.blocks(), kRowThreads, 0, launch, grid, rows,
               coefficients);
  });
}

}  // namespace

int64_t layer_norm_grn_forward_workspace(const LayerNormGrnForward& p) {
  int64_t bytes = 0;
  dispatch(p.dtype,
           [&](auto type) { bytes = ForwardScratch<typename decltype(type)::type>(p, nullptr).space.bytes(); });
  return bytes;
}

void layer_norm_grn_forward(const LayerNormGrnForward& p, const Launch& launch) {
  if (p.segments.count == 0) return;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const ForwardScratch<T> scratch(p, launch.workspace);
    const NormForward<T> rows{.rows = p.segments.rows,
                              .channels = p.channels,
                              .x = static_cast<const T*>(p.x),
                              .weight = static_cast<const A*>(p.ln_weight),
                              .bias = static_cast<const A*>(p.ln_bias),
                              .eps = static_cast<A>(p.ln_eps),
                              .y = static_cast<T*>(p.y),
                              .mean = static_cast<A*>(p.mean),
                              .rstd = static_cast<A*>(p.rstd)};
    with_width<T>(wide_columns<T>(p.channels, {p.x, p.y}, {p.ln_weight, p.ln_bias, p.beta}), [&](auto width) {
      constexpr int N = decltype(width)::value;
      statistics<T, N>(p, rows, scratch.squares.values, launch);
      const A* squares = scratch.squares.finished(launch);
      CNX_LAUNCH((grn_scale_kernel<A>), static_cast<unsigned>(p.segments.count), kStatisticsThreads, 0, launch, squares,
                 scratch.squares.finished_splits(), p.channels, static_cast<const A*>(p.gamma), static_cast<A>(p.eps),
                 static_cast<A*>(p.norm), scratch.scale);
      const ColumnGrid grid = column_grid<T>(p.segments, p.channels, N);
      CNX_LAUNCH((normalized_scale_kernel<T, N>), grid.blocks(), kColumnThreads, 0, launch, grid, rows, scratch.scale,
                 static_cast<const A*>(p.beta));
    });
  });
}

int64_t layer_norm_grn_backward_workspace(const LayerNormGrnBackward& p) {
  int64_t bytes = 0;
  dispatch(p.dtype,
           [&](auto type) { bytes = BackwardScratch<typename decltype(type)::type>(p, nullptr).space.bytes(); });
  return bytes;
}

void layer_norm_grn_backward(const LayerNormGrnBackward& p, const Launch& launch) {
  const int64_t count = p.segments.count, channels = p.channels;
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Acc<T>;
    const BackwardScratch<T> scratch(p, launch.workspace);
    A *dweight = static_cast<A*>(p.dln_weight), *dbias = static_cast<A*>(p.dln_bias);
    A *dgamma = static_cast<A*>(p.dgamma), *dbeta = static_cast<A*>(p.dbeta);
    const bool one = count == 1;  // then its terms are the sums
    if (count > 0) {
      const NormBackward<T> rows{.rows = p.segments.rows,
                                 .channels = channels,
                                 .grad = static_cast<const T*>(p.grad),
                                 .x = static_cast<const T*>(p.x),
                                 .mean = static_cast<const A*>(p.mean),
                                 .rstd = static_cast<const A*>(p.rstd),
                                 .dx = static_cast<T*>(p.dx)};
      with_width<T>(wide_columns<T>(channels, {p.grad, p.x, p.dx}, {}), [&](auto width) {
        constexpr int N = decltype(width)::value;
        const ColumnGrid grid = column_grid<T>(p.segments, channels, N);
        CNX_LAUNCH((normalized_gradient_sums_kernel<T, N>), grid.blocks(), kColumnThreads, 0, launch, grid, rows.x,
                   rows.grad, rows.mean, rows.rstd, scratch.sums.values);
        const A* sums = scratch.sums.finished(launch);
        const GradientTerms<A> terms{.coefficients = scratch.coefficients,
                                     .dweight = one ? dweight : scratch.of_norm,
                                     .dbias = one ? dbias : scratch.of_norm + channels,
                                     .dgamma = one ? dgamma : scratch.of_response,
                                     .dbeta = one ? dbeta : scratch.of_response + channels,
                                     .stride = 2 * channels};
        CNX_LAUNCH((layer_norm_grn_gradient_kernel<A>), static_cast<unsigned>(count), kStatisticsThreads, 0, launch,
                   sums, scratch.sums.finished_splits(), p.segments, channels, static_cast<const A*>(p.ln_weight),
                   static_cast<const A*>(p.ln_bias), static_cast<const A*>(p.gamma), static_cast<const A*>(p.norm),
                   static_cast<A>(p.eps), terms);
        gradient<T, N>(p, rows, scratch.coefficients, launch);
      });
    }
    if (one) return;
    sum_partials<A>(scratch.of_norm, 1, count, 2 * channels, channels, dweight, dbias, launch);
    sum_partials<A>(scratch.of_response, 1, count, 2 * channels, channels, dgamma, dbeta, launch);
  });
}

}  // namespace cuda
}  // namespace cnx
