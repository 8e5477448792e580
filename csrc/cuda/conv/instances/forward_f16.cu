#include "../launch.cuh"

namespace cnx {
namespace cuda {

template void conv_forward_of<f16>(const ConvForward&, const ConvPlan&, const Launch&);

}  // namespace cuda
}  // namespace cnx
