// CUDA implementations of the operators that every compiled backend has.
#include "cuda.h"

#include "conv.h"
#include "copy.h"
#include "norm.h"

CNX_LIBRARY_IMPL(CNX_LIBRARY, CNX_CUDA_KEY, m) {
  CNX_IMPLEMENT_SHARED(m, cnx::binding::Cuda);
}
