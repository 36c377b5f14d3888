// The headers of csrc/core as a CUDA kernel calls them: one thread, one counter, four elements, every storage type.
#include "core/gaussian.h"
#include "core/rounding.h"
#include "core/update.h"

namespace deeprelax {

__device__ float load(const float* p) { return *p; }
__device__ double load(const double* p) { return *p; }
__device__ float load(const BFloat16* p) { return from_bits(static_cast<uint32_t>(p->u) << 16); }
__device__ float load(const Float16* p) { return widen(*p); }
__device__ void store(float* p, float f) { *p = f; }
__device__ void store(double* p, double f) { *p = f; }
__device__ void store(BFloat16* p, float f) { p->u = static_cast<uint16_t>(bits(f) >> 16); }
__device__ void store(Float16* p, float f) { *p = nearest_float16(f); }

template <class T>
__device__ void four(const Twice<Twice<float>>& z, T (&to)[4]) {
  to[0] = z.lo.lo, to[1] = z.lo.hi, to[2] = z.hi.lo, to[3] = z.hi.hi;
}

template <class Stored, bool stochastic>
__global__ void step(Scalars<typename ComputeType<Stored>::type> h, Stored* y, const Stored* g,
                     typename ComputeType<Stored>::type* x, typename ComputeType<Stored>::type* m,
                     typename ComputeType<Stored>::type* v, uint64_t seed, uint32_t t, uint32_t number) {
  using T = typename ComputeType<Stored>::type;
  const int64_t q = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const uint32_t low = static_cast<uint32_t>(q), high = static_cast<uint32_t>(q >> 32);
  T z[4];
  four(normals(philox4x32<uint32_t>(Key(seed), low, high, t, number)), z);
  const auto random = words_in_order(philox4x32<uint32_t>(Key(seed), low, high, t, number | kDomainRounding));
  const uint32_t words[4] = {random.lo.lo, random.lo.hi, random.hi.lo, random.hi.hi};
  for (int lane = 0; lane < 4; ++lane) {
    const int64_t i = 4 * q + lane;
    Element<T> e{load(y + i), load(g + i), x[i], m[i], v[i], T(0), T(0)};
    take_step(h, e, z[lane], [&](T value) {
      if constexpr (stochastic) {
        return from_bits(stochastic_bfloat16(bits(value), words[lane]));
      } else {
        return stored_as(value, y);
      }
    });
    store(y + i, e.y);
    x[i] = e.x, m[i] = e.m, v[i] = e.v;
  }
}

#define STEP(Stored, T, stochastic)                                                                                     \
  template __global__ void step<Stored, stochastic>(Scalars<T>, Stored*, const Stored*, T*, T*, T*, uint64_t, uint32_t, \
                                                    uint32_t)
STEP(float, float, false);
STEP(double, double, false);
STEP(BFloat16, float, false);
STEP(BFloat16, float, true);
STEP(Float16, float, false);

}  // namespace deeprelax
