// All kernels of one instruction set, and their table.
#include "conv.inl"
#include "gather.inl"
#include "grn.inl"
#include "layer_norm_grn.inl"
#include "mlp.inl"
#include "norm.inl"

namespace cnx {
namespace CNX_ISA {

#define CNX_STRING_OF(x) #x
#define CNX_STRING(x) CNX_STRING_OF(x)

extern const KernelTable table;
const KernelTable table = {.name = CNX_STRING(CNX_ISA),
                           .vector_bytes = CNX_VECTOR_BYTES,
#define CNX_CPU_ENTRY(name, Params) .name = name,
                           CNX_CPU_KERNELS(CNX_CPU_ENTRY)
#undef CNX_CPU_ENTRY
};

}  // namespace CNX_ISA
}  // namespace cnx
