#include "../mma_launch.cuh"

namespace cnx {
namespace cuda {

template void conv_mma_of<f16>(const ConvForward&, const Launch&);

}  // namespace cuda
}  // namespace cnx
