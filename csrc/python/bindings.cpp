// The Python module deeprelax_cuda._native: the kernels on addresses and numbers, all of whose checks are Python's, and the
// watch over the tensors that were checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "deeprelax/deeprelax.h"
#include "watch.h"

namespace py = pybind11;
using namespace deeprelax;

namespace {

using Addresses = std::vector<uintptr_t>;

Step step_of(const py::object& scalars) {
  Step step;
#define DR_FIELD(name) step.name = scalars.attr(#name).cast<decltype(step.name)>()
  DR_FIELD(inner), DR_FIELD(outer), DR_FIELD(eta), DR_FIELD(k), DR_FIELD(s), DR_FIELD(a), DR_FIELD(c), DR_FIELD(wd);
  DR_FIELD(mu), DR_FIELD(damp1), DR_FIELD(nesterov), DR_FIELD(coupling_in_momentum), DR_FIELD(maximize), DR_FIELD(lr);
  DR_FIELD(mu_o), DR_FIELD(wd_o), DR_FIELD(kr), DR_FIELD(nesterov_o), DR_FIELD(seed), DR_FIELD(step);
#undef DR_FIELD
  const bool langevin = scalars.attr("family").cast<std::string_view>() == "langevin";
  step.family = langevin ? Family::langevin : Family::gradient_average;
  const bool stochastic = scalars.attr("rounding").cast<std::string_view>() == "stochastic";
  step.rounding = stochastic ? Rounding::stochastic : Rounding::nearest;
  return step;
}

// The value of an enum whose values have these names, in their order.
template <class Enum>
Enum named(std::string_view name, std::initializer_list<std::string_view> names) {
  const auto* found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw std::invalid_argument("law: no " + std::string(name));
  return static_cast<Enum>(found - names.begin());
}

// A clock whose counters and values lie at the given addresses; rule: (inner_steps, initial_gamma, scoping, gamma_min,
// gamma_total, inner_lr), law: (gamma, lr, average, temperature).
Clock clock_of(const std::array<uintptr_t, 7>& addresses, bool lr_is_float, bool counts,
               const std::tuple<int64_t, double, double, double, double, double>& rule,
               const std::tuple<std::string_view, std::string_view, std::string_view, double>& law) {
  auto at = [&](int i) { return reinterpret_cast<void*>(addresses[i]); };
  const auto [inner_steps, initial_gamma, scoping, gamma_min, gamma_total, inner_lr] = rule;
  const auto [gamma, lr, average, temperature] = law;
  return {static_cast<int64_t*>(at(0)),
          static_cast<int64_t*>(at(1)),
          static_cast<int64_t*>(at(2)),
          static_cast<double*>(at(3)),
          at(4),
          static_cast<int64_t*>(at(5)),
          at(6),
          lr_is_float,
          counts,
          inner_steps,
          initial_gamma,
          scoping,
          gamma_min,
          gamma_total,
          inner_lr,
          {named<Gamma>(gamma, {"stiffness", "drift", "variance"}), named<Rate>(lr, {"outer", "inner"}),
           named<Average>(average, {"mean", "restart"}), temperature}};
}

// The tensors of a plan, without the gradients, whose addresses come with each step.
class Table {
 public:
  Table(Dtype dtype, const std::vector<int64_t>& numels, const std::vector<uint32_t>& numbers,
        const std::vector<std::array<int64_t, 3>>& places, const Addresses& params, const Addresses& anchors,
        const Addresses& averages, const Addresses& momenta, const Addresses& masters, const Addresses& outer_momenta,
        const Addresses& consensus)
      : dtype_(dtype), tensors_(numels.size()) {
    for (size_t i = 0; i < tensors_.size(); ++i) {
      auto at = [&](const Addresses& role) { return role.empty() ? nullptr : reinterpret_cast<void*>(role.at(i)); };
      tensors_[i] = {at(params),
                     nullptr,
                     at(anchors),
                     at(averages),
                     at(momenta),
                     at(outer_momenta),
                     at(consensus),
                     at(masters),
                     numels[i],
                     numbers.at(i),
                     {places.at(i)[0], places.at(i)[1], places.at(i)[2]}};
    }
  }

  // grads: their addresses, as the bytes of an array of uintptr_t; scalars: a Scalars of steps.py.
  void run_cpu(const py::bytes& grads, const py::object& scalars, uintptr_t inv_scale, uintptr_t found_inf, const Clock* clock,
               int threads) const {
    const Step step = call(grads, scalars, inv_scale, found_inf);
    const auto* addresses = addresses_of(grads, step);
    py::gil_scoped_release release;
    cpu::step(dtype_, tensors_.data(), static_cast<int64_t>(tensors_.size()), step, threads, addresses, clock);
  }

#if defined(DEEPRELAX_CUDA)
  // stream: a cudaStream_t of the device.
  void run_cuda(const py::bytes& grads, const py::object& scalars, uintptr_t inv_scale, uintptr_t found_inf, const Clock* clock,
                int device, uintptr_t stream) {
    if (!plan_) plan_.emplace(dtype_, tensors_.data(), static_cast<int64_t>(tensors_.size()));
    const Step step = call(grads, scalars, inv_scale, found_inf);
    const auto* addresses = addresses_of(grads, step);
    py::gil_scoped_release release;
    plan_->step(step, device, reinterpret_cast<void*>(stream), addresses, clock);
  }
#endif

 private:
  Step call(const py::bytes& grads, const py::object& scalars, uintptr_t inv_scale, uintptr_t found_inf) const {
    Step step = step_of(scalars);
    if (static_cast<size_t>(PyBytes_GET_SIZE(grads.ptr())) != (step.inner ? tensors_.size() * sizeof(uintptr_t) : 0))
      throw std::invalid_argument("grads: one address per tensor of an inner step");
    step.inv_scale = reinterpret_cast<const void*>(inv_scale);
    step.found_inf = reinterpret_cast<const float*>(found_inf);
    return step;
  }

  static const void* const* addresses_of(const py::bytes& grads, const Step& step) {
    return step.inner ? reinterpret_cast<const void* const*>(PyBytes_AS_STRING(grads.ptr())) : nullptr;
  }

  Dtype dtype_;
  std::vector<Tensor> tensors_;
#if defined(DEEPRELAX_CUDA)
  std::optional<cuda::Plan> plan_;
#endif
};

py::dict build_info() {
  py::dict info;
  info["version"] = DEEPRELAX_VERSION;
  info["compiler"] = DEEPRELAX_COMPILER;
  info["flags"] = DEEPRELAX_FLAGS;
  info["nvcc"] = DEEPRELAX_NVCC;
  info["cuda_architectures"] = DEEPRELAX_ARCHITECTURES;
  info["openmp"] = bool(DEEPRELAX_OPENMP);
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of deeprelax_cuda: raw addresses and plain numbers.";
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("float64", Dtype::float64)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
  py::class_<Table>(m, "Table")
      .def(py::init<Dtype, const std::vector<int64_t>&, const std::vector<uint32_t>&,
                    const std::vector<std::array<int64_t, 3>>&, const Addresses&, const Addresses&, const Addresses&,
                    const Addresses&, const Addresses&, const Addresses&, const Addresses&>())
#if defined(DEEPRELAX_CUDA)
      .def("run_cuda", &Table::run_cuda)
#endif
      .def("run_cpu", &Table::run_cpu);
  py::class_<Clock>(m, "Clock").def(py::init(&clock_of));
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::object&, uintptr_t, int64_t, const py::list&, const py::dict&, const py::list&>())
      .def("look", &Watch::look);
  m.def("gaussian",
        [](uintptr_t out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset, int threads) {
          py::gil_scoped_release release;
          cpu::gaussian(reinterpret_cast<float*>(out), numel, seed, step, stream, offset, threads);
        });
#if defined(DEEPRELAX_CUDA)
  m.def("cuda_gaussian", [](uintptr_t out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset,
                            int device, uintptr_t cuda_stream) {
    py::gil_scoped_release release;
    cuda::gaussian(reinterpret_cast<float*>(out), numel, seed, step, stream, offset, device,
                   reinterpret_cast<void*>(cuda_stream));
  });
  m.def("cuda_unavailable", &cuda::unavailable, py::call_guard<py::gil_scoped_release>());
#endif
  m.def("instruction_set", &cpu::instruction_set);
  m.def("use_instruction_set", &cpu::use_instruction_set);
  m.def("build_info", &build_info);
}
