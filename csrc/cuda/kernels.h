// What the launcher knows of the kernels: one of each kind for every storage type, and how to start one. A GPU's are in
// kernels.cuh and device.cu; tests put functions in their place that run the same bodies in a loop.
#pragma once

#include "step.h"

namespace deeprelax::cuda {

// A kernel as the runtime knows it.
using Kernel = const void*;

struct Kernels {
  Kernel langevin_step[2][2];       // [noise][momentum]
  Kernel gradient_average_step[2];  // [noise]
  Kernel langevin_step_general[2];  // [on_device], like those that follow
  Kernel gradient_average_step_general[2];
  Kernel outer_step[2];
};

// All kernels of a storage type. `Of` turns a kind of kernel into a kernel.
template <class Stored, template <class> class Langevin, template <class> class GradientAverage,
          template <class> class OuterStep>
Kernels kernels_of() {
  constexpr Family A = Family::langevin, B = Family::gradient_average;
  return {{{Langevin<PlainLangevin<Stored, false, false>>::kernel(), Langevin<PlainLangevin<Stored, false, true>>::kernel()},
           {Langevin<PlainLangevin<Stored, true, false>>::kernel(), Langevin<PlainLangevin<Stored, true, true>>::kernel()}},
          {GradientAverage<PlainGradientAverage<Stored, false>>::kernel(),
           GradientAverage<PlainGradientAverage<Stored, true>>::kernel()},
          {Langevin<General<Stored, A, false>>::kernel(), Langevin<General<Stored, A, true>>::kernel()},
          {GradientAverage<General<Stored, B, false>>::kernel(), GradientAverage<General<Stored, B, true>>::kernel()},
          {OuterStep<Outer<Stored, false>>::kernel(), OuterStep<Outer<Stored, true>>::kernel()}};
}

// The kernels of a storage type, those that work out a clock's numbers (for float and double), and that of the normals.
const Kernels& kernels(Dtype dtype);
Kernel advance_kernel(Dtype dtype);
Kernel gaussian_kernel();

// Starts a kernel on a device's stream; throws std::runtime_error where that fails.
void launch(Kernel kernel, int64_t blocks, int threads, const void* arguments, int device, void* stream);

}  // namespace deeprelax::cuda
