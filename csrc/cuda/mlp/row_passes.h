// The passes over rows [rows, channels] that the MLP and the stand-alone GRN are made of. `splits` of a segment leave
// sums [count, splits, ...] behind, see columns.cuh; splits are column_splits<T>(segments, channels).
#pragma once

#include "cnx/cuda.h"

namespace cnx {
namespace cuda {

// f is the activation throughout.
struct RowPass {
  DType dtype;
  Segments segments;
  int64_t channels;
  Activation activation;
};

// Column sums of f(x)^2 [count, splits, H]; f(x) is stored when h is not null, and h may be x.
void square_sums(const RowPass&, const void* x, void* h, void* partial, const Launch&);

// Column sums of grad f(x) [count, splits, H]; with_grad: [count, splits, 2, H], the second those of grad.
void gradient_sums(const RowPass&, const void* x, const void* grad, bool with_grad, void* partial, const Launch&);

// Column sums of x [count, splits, H].
void column_sums(const RowPass&, const void* x, void* partial, const Launch&);

// y = f(x) [* scale] [+ beta], scale A [count, H] or null; y may be x.
void scale_rows(const RowPass&, const void* x, const void* scale, const void* beta, void* y, const Launch&);

// dx = (grad * scale + f(x) * kappa) f'(x), its column sums [count, splits, H] unless partial is null; hs = f(x) *
// scale unless null. hs may be x, dx may be grad.
void gradient_rows(const RowPass&, const void* x, const void* grad, const void* scale, const void* kappa, void* hs,
                   void* dx, void* partial, const Launch&);

}  // namespace cuda
}  // namespace cnx
