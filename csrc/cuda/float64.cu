#include "kernels.cuh"

namespace deeprelax::cuda {
template const Kernels& device_kernels<double>();
}
