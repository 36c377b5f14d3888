// The portable kernels behind C names, for tests that build changed copies of them (tests/test_mutants.py).
#include "deeprelax/deeprelax.h"

extern "C" {

__attribute__((visibility("default"))) void probe_step(int dtype, const deeprelax::Tensor* tensor,
                                                       const deeprelax::Step* step) {
  deeprelax::cpu::step(static_cast<deeprelax::Dtype>(dtype), tensor, 1, *step, 1);
}

__attribute__((visibility("default"))) void probe_gaussian(float* out, int64_t numel, uint64_t seed, uint32_t step,
                                                           uint32_t stream, int64_t offset) {
  deeprelax::cpu::gaussian(out, numel, seed, step, stream, offset, 1);
}
}
