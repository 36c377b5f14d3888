// The native interface of deeprelax: raw pointers and plain numbers, no torch, no Python.
//
// One call takes one step of the numeric contract (docs/contract.md) on any number of tensors, in place: the same bits whatever
// the instruction set, the number of threads or the split into calls.
#pragma once

#include <cstdint>

namespace deeprelax {

enum class Dtype : int { float32, float64, bfloat16, float16 };
enum class Family : int { langevin, gradient_average };
enum class Rounding : int { nearest, stochastic };

// Where local element j lies in the logical, unsharded tensor: offset + (j / run) * pitch + j % run.
struct Place {
  int64_t offset;
  int64_t run;
  int64_t pitch;
};

// One parameter and its state, each dense and laid out alike. y and g are of the call's dtype, the others float32 (float64 for
// float64). A role that plays no part in the call is null.
struct Tensor {
  void* y;        // the parameter
  const void* g;  // its gradient
  void* x;        // anchor
  void* m;        // running average: of y (Langevin), of the gradient (gradient average; p of the formula)
  void* v;        // inner momentum
  void* w;        // outer momentum
  const void* c;  // consensus of the replicas
  void* master;   // the float32 y behind a bfloat16 or float16 parameter
  int64_t numel;
  uint32_t number;  // of the noise stream, below 2^28
  Place place;
};

// The numbers of one call, in the names of the formula, already rounded to the compute type of the dtype.
struct Step {
  Family family = Family::langevin;
  bool inner = true;   // take the inner step
  bool outer = false;  // take the outer step (after the inner one)
  double eta = 0, k = 0, s = 0, a = 0, c = 0, wd = 0, mu = 0, damp1 = 1;
  bool nesterov = false, coupling_in_momentum = true, maximize = false;
  double lr = 0, mu_o = 0, wd_o = 0, kr = 0;
  bool nesterov_o = false;
  uint64_t seed = 0;
  uint32_t step = 0;
  Rounding rounding = Rounding::nearest;
  const void* inv_scale = nullptr;   // a number of the compute type that multiplies the gradient
  const float* found_inf = nullptr;  // where it holds a number other than 0 (NaN counts), the call writes nothing
};

namespace cpu {

// Takes the step on `count` tensors with at most `threads` threads. `grads`, where it is given, holds their gradients in place
// of Tensor::g, so that a table can be kept from call to call.
void step(Dtype dtype, const Tensor* tensors, int64_t count, const Step& step, int threads, const void* const* grads = nullptr);

// Writes the normals of elements offset .. offset + numel of a stream (the whole counter word) to `out`.
void gaussian(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset, int threads);

// The instruction set in use: "avx512", "avx2" or "portable".
const char* instruction_set();

// Uses another instruction set from now on; false, and no change, where this machine or build has none of that name.
bool use_instruction_set(const char* name);

}  // namespace cpu
}  // namespace deeprelax
