// The CPU kernels in plain C++: one lane at a time, one counter a block.
#include "../core/rounding.h"

namespace deeprelax::cpu {
namespace {

DR_FN void read(float& f, const float* p) { f = *p; }
DR_FN void read(double& f, const double* p) { f = *p; }
DR_FN void read(float& f, const BFloat16* p) { f = from_bits(static_cast<uint32_t>(p->u) << 16); }
DR_FN void read(float& f, const Float16* p) { f = widen(*p); }
// What is written has been rounded to the storage type before.
DR_FN void write(float* p, float f) { *p = f; }
DR_FN void write(double* p, double f) { *p = f; }
DR_FN void write(BFloat16* p, float f) { p->u = static_cast<uint16_t>(bits(f) >> 16); }
DR_FN void write(Float16* p, float f) { *p = nearest_float16(f); }

using BigWord = uint32_t;
using SmallWord = uint32_t;
template <class T>
using Part = Twice<Twice<T>>;

}  // namespace
}  // namespace deeprelax::cpu

#include "lifted_memory.h"
#include "step.h"

namespace deeprelax::cpu {
const Kernels kPortable = kernels_of("portable");
}
