// The Python module deeprelax_cuda._native: addresses and numbers in, one native call out. All checks are Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "deeprelax/deeprelax.h"

namespace py = pybind11;
using namespace deeprelax;

namespace {

using Addresses = std::vector<uintptr_t>;

// The tensors of a plan: filled once, the gradients' addresses at each step.
class Table {
 public:
  Table(int dtype, const std::vector<int64_t>& numels, const std::vector<uint32_t>& numbers,
        const std::vector<std::array<int64_t, 3>>& places, const Addresses& params, const Addresses& anchors,
        const Addresses& averages, const Addresses& momenta, const Addresses& masters, const Addresses& outer_momenta,
        const Addresses& consensus)
      : dtype_(static_cast<Dtype>(dtype)), tensors_(numels.size()) {
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

  void run(const Addresses& grads, Step step, uintptr_t inv_scale, uintptr_t found_inf, int threads) {
    if (grads.size() != (step.inner ? tensors_.size() : 0))
      throw std::invalid_argument("grads: one per tensor of an inner step");
    for (size_t i = 0; i < grads.size(); ++i) tensors_[i].g = reinterpret_cast<const void*>(grads[i]);
    step.inv_scale = reinterpret_cast<const float*>(inv_scale);
    step.found_inf = reinterpret_cast<const float*>(found_inf);
    py::gil_scoped_release release;
    cpu::step(dtype_, tensors_.data(), static_cast<int64_t>(tensors_.size()), step, threads);
  }

 private:
  Dtype dtype_;
  std::vector<Tensor> tensors_;
};

Step make_step(bool langevin, bool inner, bool outer, double eta, double k, double s, double a, double c, double wd, double mu,
               double damp1, bool nesterov, bool coupling_in_momentum, bool maximize, double lr, double mu_o, double wd_o,
               double kr, bool nesterov_o, uint64_t seed, uint32_t step, bool stochastic) {
  Step h;
  h.family = langevin ? Family::langevin : Family::gradient_average;
  h.inner = inner, h.outer = outer;
  h.eta = eta, h.k = k, h.s = s, h.a = a, h.c = c, h.wd = wd, h.mu = mu, h.damp1 = damp1;
  h.nesterov = nesterov, h.coupling_in_momentum = coupling_in_momentum, h.maximize = maximize;
  h.lr = lr, h.mu_o = mu_o, h.wd_o = wd_o, h.kr = kr, h.nesterov_o = nesterov_o;
  h.seed = seed, h.step = step;
  h.rounding = stochastic ? Rounding::stochastic : Rounding::nearest;
  return h;
}

py::dict build_info() {
  py::dict info;
  info["version"] = DEEPRELAX_VERSION;
  info["compiler"] = DEEPRELAX_COMPILER;
  info["nvcc"] = DEEPRELAX_NVCC;
  info["openmp"] = bool(DEEPRELAX_OPENMP);
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of deeprelax_cuda: raw addresses and plain numbers.";
  py::class_<Table>(m, "Table")
      .def(py::init<int, const std::vector<int64_t>&, const std::vector<uint32_t>&, const std::vector<std::array<int64_t, 3>>&,
                    const Addresses&, const Addresses&, const Addresses&, const Addresses&, const Addresses&, const Addresses&,
                    const Addresses&>())
      .def("run", &Table::run);
  py::class_<Step>(m, "Step").def(py::init(&make_step));
  m.def("gaussian",
        [](uintptr_t out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset, int threads) {
          py::gil_scoped_release release;
          cpu::gaussian(reinterpret_cast<float*>(out), numel, seed, step, stream, offset, threads);
        });
  m.def("instruction_set", &cpu::instruction_set);
  m.def("use_instruction_set", &cpu::use_instruction_set);
  m.def("build_info", &build_info);
}
