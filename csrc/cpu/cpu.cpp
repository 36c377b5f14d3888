// The CPU backend: picks an instruction set once, shares a call out to threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>

#include "../core/clock.h"
#include "../table.h"
#include "kernels.h"

namespace deeprelax::cpu {
namespace {

// Below this many elements a thread costs more than it brings.
constexpr int64_t kElementsPerThread = 16384;

bool usable(const Kernels& kernels) {
#if defined(DEEPRELAX_X86)
  __builtin_cpu_init();
  if (&kernels == &kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  if (&kernels == &kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#endif
  return &kernels == &kPortable;
}

#if defined(DEEPRELAX_X86)
const Kernels* const kAll[] = {&kAvx512, &kAvx2, &kPortable};
#else
const Kernels* const kAll[] = {&kPortable};
#endif

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{
      *std::find_if(std::begin(kAll), std::end(kAll), [](auto* k) { return usable(*k); })};
  return kernels;
}

int shares_of(int64_t elements, int threads) {
  return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, std::max(threads, 1)));
}

// Calls work(share) for every share, each on a thread of its own where OpenMP is there.
template <class Work>
void share_out(int shares, const Work& work) {
#if defined(_OPENMP)
  if (shares > 1) {
#pragma omp parallel for num_threads(shares) schedule(static, 1)
    for (int share = 0; share < shares; ++share) work(share);
    return;
  }
#endif
  for (int share = 0; share < shares; ++share) work(share);
}

template <class T>
void take(Dtype dtype, const Tensor* tensors, int64_t count, const Step& step, int threads, const void* const* grads,
          const Clock* clock) {
  const Numbers<T> now = clock ? advance<T>(*clock, step) : Numbers<T>{Scalars<T>(step), step.step};
  if (!now.scalars.inner && !now.scalars.outer) return;
  const auto kernel = chosen().load()->step[static_cast<int>(dtype)];
  const Work work{tensors, grads, count, total_cost(tensors, count), step, &now};
  const int shares = shares_of(work.cost, threads);
  share_out(shares, [&](int share) { kernel(work, share, shares); });
}

}  // namespace

void step(Dtype dtype, const Tensor* tensors, int64_t count, const Step& step, int threads, const void* const* grads,
          const Clock* clock) {
  if (step.found_inf && *step.found_inf != 0.0f) return;
  if (dtype == Dtype::float64) {
    take<double>(dtype, tensors, count, step, threads, grads, clock);
  } else {
    take<float>(dtype, tensors, count, step, threads, grads, clock);
  }
}

void gaussian(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset, int threads) {
  const auto kernel = chosen().load()->gaussian;
  Tensor whole{};
  whole.numel = numel;
  const int64_t cost = total_cost(&whole, 1);
  const int shares = shares_of(cost, threads);
  share_out(shares, [&](int share) {
    visit_share(&whole, 1, cost, share, shares, [&](int64_t, int64_t begin, int64_t end) {
      kernel(out + begin, end - begin, seed, step, stream, offset + begin);
    });
  });
}

const char* instruction_set() { return chosen().load()->name; }

bool use_instruction_set(const char* name) {
  for (const Kernels* kernels : kAll) {
    if (std::strcmp(kernels->name, name) == 0 && usable(*kernels)) {
      chosen() = kernels;
      return true;
    }
  }
  return false;
}

}  // namespace deeprelax::cpu
