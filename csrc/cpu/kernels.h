// What each instruction set offers to the dispatcher.
#pragma once

#include "deeprelax/deeprelax.h"

namespace deeprelax::cpu {

// A call: its tensors, their gradients where these are not in the table, and its numbers.
struct Work {
  const Tensor* tensors;
  const void* const* grads;
  int64_t count, cost;
  const Step& step;
  const void* numbers;  // the Numbers<T> of the compute type of the tensors
};

struct Kernels {
  const char* name;
  // Takes the step on the share-th of `shares` parts of the work; indexed by Dtype.
  void (*step[4])(const Work& work, int share, int shares);
  void (*gaussian)(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset);
};

extern const Kernels kPortable, kAvx2, kAvx512;

}  // namespace deeprelax::cpu
