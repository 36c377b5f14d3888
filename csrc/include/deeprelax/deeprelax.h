// The native interface of deeprelax: raw pointers and plain numbers, no torch, no Python.
//
// One call takes one step of the numeric contract (docs/contract.md) on any number of tensors, in place: the same bits whatever
// the instruction set, the number of threads or the split into calls.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace deeprelax {

enum class Dtype : int { float32, float64, bfloat16, float16 };
enum class Family : int { langevin, gradient_average };
enum class Rounding : int { nearest, stochastic };
enum class Gamma : int { stiffness, drift, variance };
enum class Rate : int { outer, inner };
enum class Average : int { mean, restart };

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

// What gamma, lr and the steps of a period are in the formula: a method's way from them to the numbers of a step.
struct Law {
  Gamma gamma = Gamma::stiffness;   // stiffness: k = 1/gamma; drift: c = gamma; variance: s = sqrt(gamma*temperature)
  Rate lr = Rate::outer;            // outer: lr is that of the outer step; inner: eta = lr, s = sqrt(2*lr*temperature)
  Average average = Average::mean;  // mean: a = 1/n for the n-th sample; restart: 1 for the first, Step's a after it
  double temperature = 0;           // 0: no noise, whatever is under the root
};

// Counters and values in the memory of the device that takes the steps, so that a captured graph goes on counting (with
// deeprelax_cuda: capturable=True). A call with a clock takes `outer`, the noise's `step` and what its law determines from it
// in place of Step's, and `a` too where there are period_steps: the call is the next inner step of its period, and ends it when
// it is the last. In the gradient average only a period that has counted a gradient ends in an outer step, where there are
// period_steps. The pointers are to the device's memory, the rest are plain numbers.
struct Clock {
  int64_t* step;         // inner steps taken
  int64_t* position;     // of them in this period
  int64_t* outer_steps;  // periods
  double* gamma;
  const void* lr;         // a double, or a float where lr_is_float
  int64_t* period_steps;  // samples in the period's average, below 0 before the first that counts; null for a constant a
  void* numbers;          // kClockNumbers bytes at an address that 16 divides, for the numbers of the call
  bool lr_is_float;
  bool counts;          // whether this call moves the counters on; of several that share them it is the last
  int64_t inner_steps;  // 0: no period ends
  double initial_gamma, scoping, gamma_min;
  double gamma_total;  // 0: gamma follows `scoping`
  double inner_lr;     // the initial one, by which time runs with gamma_total
  Law law = {};
};
constexpr int64_t kClockNumbers = 256;

namespace cpu {

// Takes the step on `count` tensors with at most `threads` threads. `grads`, where it is given, holds their gradients in place
// of Tensor::g, so that a table can be kept from call to call.
void step(Dtype dtype, const Tensor* tensors, int64_t count, const Step& step, int threads, const void* const* grads = nullptr,
          const Clock* clock = nullptr);

// Writes the normals of elements offset .. offset + numel of a stream (the whole counter word) to `out`.
void gaussian(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset, int threads);

// The instruction set in use: "avx512", "avx2" or "portable".
const char* instruction_set();

// Uses another instruction set from now on; false, and no change, where this machine or build has none of that name.
bool use_instruction_set(const char* name);

}  // namespace cpu

// The CUDA backend, in builds that have it. Nothing here synchronises with the device or allocates on it. What goes wrong in
// the CUDA runtime is thrown as std::runtime_error.
namespace cuda {

// The launches of a call on tensors that stay where they are: one for each 288 of them.
class Plan {
 public:
  Plan(Dtype dtype, const Tensor* tensors, int64_t count);
  Plan(Plan&&) noexcept;
  ~Plan();

  // Enqueues the step on a stream (a cudaStream_t) of a device. `grads`, where it is given, holds the gradients' addresses in
  // place of Tensor::g. Not for several threads at a time.
  void step(const Step& step, int device, void* stream, const void* const* grads = nullptr, const Clock* clock = nullptr);

 private:
  struct Launches;
  std::unique_ptr<Launches> launches_;
};

// Enqueues the writing of the normals of elements offset .. offset + numel of a stream (the whole counter word) to `out`.
void gaussian(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset, int device,
              void* cuda_stream);

// Why the kernels cannot run on a device, in words; empty where they can.
std::string unavailable(int device);

// In place of a device: everything is done but the launch, to time the host's part of a step.
constexpr int kNoDevice = -1;

}  // namespace cuda
}  // namespace deeprelax
