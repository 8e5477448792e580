// The kernels for AVX-512 F, BW, DQ, VL. Compile flags: csrc/sources.txt.
#define CNX_ISA avx512
#define CNX_VECTOR_BYTES 64
#include "../table.inl"
