// All kernels of one instruction set, and their table.
#include "conv.inl"
#include "mlp.inl"

namespace cnx {
namespace CNX_ISA {

#define CNX_STRING_OF(x) #x
#define CNX_STRING(x) CNX_STRING_OF(x)

extern const KernelTable table;
const KernelTable table = {
    CNX_STRING(CNX_ISA),
    CNX_VECTOR_BYTES,
    conv_forward,
    conv_weight_grad,
    layer_norm_forward,
    layer_norm_backward,
    space_to_depth_norm_forward,
    space_to_depth_norm_backward,
    grn_forward,
    grn_backward,
    gelu_square_sum,
    scale_rows,
    mlp_backward_reduce,
    mlp_backward_pointwise,
    grn_scale,
    grn_gradient,
    column_sum,
};

}  // namespace CNX_ISA
}  // namespace cnx
