// What each instruction set offers to the dispatcher.
#pragma once

#include "deeprelax/deeprelax.h"

namespace deeprelax::cpu {

struct Kernels {
  const char* name;
  // Takes the step on elements begin .. end of one tensor; indexed by Dtype.
  void (*step[4])(const Tensor& tensor, int64_t begin, int64_t end, const Step& step);
  void (*gaussian)(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace deeprelax::cpu
