#include "../mma_launch.cuh"

namespace cnx {
namespace cuda {

template void conv_tensor_of<f16>(const ConvForward&, const Launch&);

}  // namespace cuda
}  // namespace cnx
