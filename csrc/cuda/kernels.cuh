// The step kernels of one storage type, under the names of their operators.
#pragma once

#include "kernels.h"

namespace deeprelax::cuda {

template <class Kind>
using ArgumentsOf = Arguments<typename ComputeType<typename Kind::Stored>::type>;

template <class Kind>
__global__ void __launch_bounds__(kThreads, Kind::blocks_per_sm) langevin_step(const __grid_constant__ ArgumentsOf<Kind> args) {
  step_body<Kind>(args, blockIdx.x, threadIdx.x);
}
template <class Kind>
__global__ void __launch_bounds__(kThreads, Kind::blocks_per_sm)
    gradient_average_step(const __grid_constant__ ArgumentsOf<Kind> args) {
  step_body<Kind>(args, blockIdx.x, threadIdx.x);
}
template <class Kind>
__global__ void __launch_bounds__(kThreads, Kind::blocks_per_sm) outer_step(const __grid_constant__ ArgumentsOf<Kind> args) {
  step_body<Kind>(args, blockIdx.x, threadIdx.x);
}

template <class Kind>
struct LangevinKernel {
  static Kernel kernel() { return reinterpret_cast<Kernel>(&langevin_step<Kind>); }
};
template <class Kind>
struct GradientAverageKernel {
  static Kernel kernel() { return reinterpret_cast<Kernel>(&gradient_average_step<Kind>); }
};
template <class Kind>
struct OuterKernel {
  static Kernel kernel() { return reinterpret_cast<Kernel>(&outer_step<Kind>); }
};

template <class Stored>
const Kernels& device_kernels() {
  static const Kernels all = kernels_of<Stored, LangevinKernel, GradientAverageKernel, OuterKernel>();
  return all;
}

}  // namespace deeprelax::cuda
