// The passes over rows [rows, channels] that the MLP and the stand-alone GRN are made of. They take the structs of the
// four operators (cnx/params.h), of which GRN fills in its own. `splits` of a segment leave sums [count, splits, ...]
// behind in `partial`, see columns.cuh; splits are column_splits<T>(segments, channels).
#pragma once

#include "cnx/cuda.h"

namespace cnx {
namespace cuda {

// Column sums of h^2 [count, splits, H], h = activation(a), which is stored when p.h is not null.
void square_sums(const GeluStatistics& p, void* partial, const Launch&);

// Column sums of ds h [count, splits, H]; with_ds: [count, splits, 2, H], the second those of ds.
void gradient_sums(const MlpBackwardStatistics& p, bool with_ds, void* partial, const Launch&);

// Column sums of x [splits, H], of all rows as one segment.
void column_sums(const ColumnSum& p, void* partial, const Launch&);

void scale_rows(const GeluScale& p, const Launch&);

// p.da, its column sums [count, splits, H] unless partial is null, and h * scale unless p.hs is null. No beta.
void gradient_rows(const MlpBackwardPointwise& p, void* partial, const Launch&);

}  // namespace cuda
}  // namespace cnx
