// The kernels for AVX2 and FMA. Compile flags: csrc/sources.txt.
#define CNX_ISA avx2
#define CNX_VECTOR_BYTES 32
#include "../table.inl"
