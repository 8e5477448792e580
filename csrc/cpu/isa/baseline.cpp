// The kernels for any processor of the target architecture (SSE2, NEON). Compile flags: csrc/sources.txt.
#define CNX_ISA baseline
#define CNX_VECTOR_BYTES 16
#include "../table.inl"
