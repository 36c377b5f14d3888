// The kernels that are not steps, and everything that is asked of the CUDA runtime.
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace deeprelax::cuda {

template <class Stored>
const Kernels& device_kernels();

namespace {

template <class T>
__global__ void advance_clock(const __grid_constant__ ClockArguments args) {
  advance_body<T>(args);
}

__global__ void __launch_bounds__(kThreads) gaussian_kernel_of(const __grid_constant__ GaussianArguments args) {
  gaussian_body(args, blockIdx.x, threadIdx.x);
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("deeprelax: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device the current one until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace

const Kernels& kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return device_kernels<double>();
    case Dtype::bfloat16:
      return device_kernels<BFloat16>();
    case Dtype::float16:
      return device_kernels<Float16>();
    default:
      return device_kernels<float>();
  }
}

Kernel advance_kernel(Dtype dtype) {
  return dtype == Dtype::float64 ? reinterpret_cast<Kernel>(&advance_clock<double>)
                                 : reinterpret_cast<Kernel>(&advance_clock<float>);
}

Kernel gaussian_kernel() { return reinterpret_cast<Kernel>(&gaussian_kernel_of); }

void launch(Kernel kernel, int64_t blocks, int threads, const void* arguments, int device, void* stream) {
  const DeviceGuard guard(device);
  void* pointers[] = {const_cast<void*>(arguments)};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), pointers, 0,
                         static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

std::string unavailable(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;  // asking loads the code, and fails where there is none for the device
    check(cudaFuncGetAttributes(&attributes, kernels(Dtype::float32).langevin_step[1][1]), "no kernel for this device");
    return "";
  } catch (const std::runtime_error& error) {
    cudaGetLastError();  // leaves none behind for others to find
    return error.what();
  }
}

}  // namespace deeprelax::cuda
