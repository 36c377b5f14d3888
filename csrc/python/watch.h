// Whether a step's tensors are those of the step before: found out in one walk over the Python objects, since on many small
// tensors nearly all of a step is asking for their facts one by one.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "exchange.h"

namespace deeprelax {

// Takes note of the parameters and their state, and compares them at each look; `Watch` of deeprelax_cuda/watch.py says what is
// compared. Objects are known by their addresses alone: whoever makes a Watch keeps them alive.
class Watch {
 public:
  // small: bytes of a tensor up to which asking for facts costs more than taking its step; groups: the lists of parameters;
  // state: each parameter's dict; written: dense tensors that gradients must not overlap.
  Watch(const pybind11::object& exchange, uintptr_t address_of, int64_t small, const pybind11::list& groups,
        const pybind11::dict& state, const pybind11::list& written)
      : exchange_(exchange, address_of), small_(small) {
    for (auto group : groups) {
      for (auto p : group) note_param(p.ptr());
      ends_of_groups_.push_back(params_.size());
    }
    note_state(state);
    for (auto t : written) {
      const TensorView view = read(t.ptr());
      if (!view.nbytes()) continue;
      starts_.push_back(view.address());
      ends_.push_back(view.address() + static_cast<uintptr_t>(view.nbytes()));
    }
    std::sort(starts_.begin(), starts_.end());  // disjoint, so that each stays with its end
    std::sort(ends_.begin(), ends_.end());
  }

  // Returns (grads, fit, addresses) as a Look of watch.py, or None where anything but the gradients has changed.
  pybind11::object look(const pybind11::list& groups, const pybind11::dict& state) {
    if (groups.size() != ends_of_groups_.size()) return pybind11::none();
    pybind11::list grads(params_.size());
    std::vector<uintptr_t> addresses;
    addresses.reserve(params_.size());
    Getter gradient(grad_);
    bool fit = true;
    size_t i = 0, group = 0;
    for (auto params : groups) {
      const size_t end = ends_of_groups_[group++];
      if (!PyList_Check(params.ptr()) || PyList_GET_SIZE(params.ptr()) != static_cast<Py_ssize_t>(end - i)) {
        return pybind11::none();
      }
      for (Py_ssize_t j = 0; i < end && j < PyList_GET_SIZE(params.ptr()); ++i, ++j) {
        Param& known = params_[i];
        PyObject* p = PyList_GET_ITEM(params.ptr(), j);
        if (p != known.object || exchange_.address(p) != known.address) return pybind11::none();
        PyObject* g = gradient(p);
        PyList_SET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i), g);
        if ((g != Py_None) != known.has_grad) return pybind11::none();
        const bool fits = known.has_grad && can_be_read(g, known, addresses);
        // A gradient is like its parameter was when it came: what fits the gradient need not be asked of a small parameter that
        // cannot be laid out in two ways.
        const bool is_plain = fits && known.kind.ndim <= 1 && known.nbytes <= small_;
        if (!is_plain && !is_as_noted(p, known)) return pybind11::none();
        fit = fit && (fits || !known.has_grad);
      }
      if (i != end) return pybind11::none();
    }
    if (!is_as_noted(state)) return pybind11::none();
    const auto* bytes = reinterpret_cast<const char*>(addresses.data());
    return pybind11::make_tuple(std::move(grads), fit, pybind11::bytes(bytes, addresses.size() * sizeof(uintptr_t)));
  }

 private:
  struct Param {
    PyObject* object;
    uintptr_t address;
    TensorView kind;  // without its shape and strides, which are at `sizes`
    size_t sizes;
    int64_t nbytes;
    bool is_single;  // of one element
    bool has_grad;
    uintptr_t clear_grad;  // address of a gradient that was found to be clear of what is written
  };
  struct Entry {
    PyObject *name, *value;  // no value: a number
  };
  struct State {
    PyObject *param, *dict;
    size_t end;  // of its entries
  };
  struct Memory {
    PyObject* tensor;
    uintptr_t address;
  };

  // Reads an attribute through the descriptor of the object's class, which is looked up where the class changes.
  class Getter {
   public:
    explicit Getter(const pybind11::str& name) : name_(name) {}

    PyObject* operator()(PyObject* object) {
      if (PyTypeObject* type = Py_TYPE(object); type != type_) {
        descriptor_ = pybind11::getattr(reinterpret_cast<PyObject*>(type), name_);
        type_ = type;
      }
      PyTypeObject* kind = Py_TYPE(descriptor_.ptr());
      PyObject* value = kind->tp_descr_get && kind->tp_descr_set
                            ? kind->tp_descr_get(descriptor_.ptr(), object, reinterpret_cast<PyObject*>(type_))
                            : PyObject_GetAttr(object, name_.ptr());
      if (!value) throw pybind11::error_already_set();
      return value;
    }

   private:
    const pybind11::str& name_;
    PyTypeObject* type_ = nullptr;
    pybind11::object descriptor_;
  };

  TensorView read(PyObject* tensor) const {
    TensorView view;
    if (!exchange_.view(tensor, view)) throw pybind11::value_error("a tensor without memory of its own");
    return view;
  }

  void note_param(PyObject* p) {
    TensorView view = read(p);
    if (exchange_.address(p) != view.address()) throw pybind11::value_error("a tensor with two addresses");
    auto grad = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(p, grad_.ptr()));
    if (!grad) throw pybind11::error_already_set();
    const int64_t nbytes = view.nbytes(), itemsize = int64_t(view.dtype.bits) * view.dtype.lanes / 8;
    ask_all_ = ask_all_ || (!grad.is_none() && is_negated(grad.ptr()));
    const size_t sizes = sizes_.size();
    sizes_.insert(sizes_.end(), view.shape, view.shape + view.ndim);
    sizes_.insert(sizes_.end(), view.strides, view.strides + view.ndim);
    view.shape = view.strides = nullptr;
    params_.push_back({p, view.address(), view, sizes, nbytes, nbytes == itemsize, !grad.is_none(), 0});
  }

  void note_state(const pybind11::dict& state) {
    PyObject *param, *dict, *name, *value;
    std::vector<Memory> of_largest;
    int64_t largest = -1;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &param, &dict);) {
      std::vector<Memory> own;
      int64_t nbytes = 0;
      for (Py_ssize_t in = 0; PyDict_Check(dict) && PyDict_Next(dict, &in, &name, &value);) {
        entries_.push_back({name, PyLong_Check(value) ? nullptr : value});
        TensorView view;
        if (PyLong_Check(value) || !exchange_.view(value, view)) continue;
        own.push_back({value, view.address()});
        nbytes = std::max(nbytes, view.nbytes());
      }
      states_.push_back({param, dict, entries_.size()});
      if (nbytes > small_) memory_.insert(memory_.end(), own.begin(), own.end());
      if (nbytes > largest) largest = nbytes, of_largest = own;
    }
    if (largest <= small_) memory_ = of_largest;
  }

  bool is_as_noted(PyObject* p, const Param& known) const {
    TensorView now;
    if (!exchange_.view(p, now)) return false;
    const int64_t* sizes = sizes_.data() + known.sizes;
    const size_t bytes = known.kind.ndim * sizeof(int64_t);
    return now.is_of_kind(known.kind) && std::memcmp(now.shape, sizes, bytes) == 0 &&
           std::memcmp(now.strides, sizes + known.kind.ndim, bytes) == 0;
  }

  bool is_as_noted(const pybind11::dict& state) const {
    if (PyDict_Size(state.ptr()) != static_cast<Py_ssize_t>(states_.size())) return false;
    PyObject *param, *dict, *name, *value;
    size_t e = 0, s = 0;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &param, &dict); ++s) {
      const State& known = states_[s];
      if (param != known.param || dict != known.dict) return false;
      if (!PyDict_Check(dict)) continue;
      for (Py_ssize_t in = 0; PyDict_Next(dict, &in, &name, &value); ++e) {
        if (e == known.end) return false;
        const Entry& entry = entries_[e];
        if (name != entry.name) return false;
        if (value != entry.value && (entry.value || !PyLong_Check(value))) return false;
      }
      if (e != known.end) return false;
    }
    return std::all_of(memory_.begin(), memory_.end(),
                       [this](const Memory& noted) { return exchange_.address(noted.tensor) == noted.address; });
  }

  bool can_be_read(PyObject* g, Param& known, std::vector<uintptr_t>& addresses) {
    TensorView now;
    if (!exchange_.view(g, now) || !now.is_of_kind(known.kind)) return false;
    const int64_t *shape = sizes_.data() + known.sizes, *strides = shape + known.kind.ndim;
    for (int32_t i = 0; i < now.ndim; ++i) {
      if (now.shape[i] != shape[i] || (now.strides[i] != strides[i] && shape[i] != 1 && known.nbytes)) return false;
    }
    if (known.nbytes && !now.address()) return false;  // zeros without memory
    if ((known.is_single || ask_all_) && is_negated(g)) return false;
    if (now.address() != known.clear_grad && !is_clear(now.address(), now.address() + known.nbytes)) return false;
    known.clear_grad = now.address();
    addresses.push_back(now.address());
    return true;
  }

  // Torch keeps a negation as a flag. One that nobody has forced comes from the imaginary part of a conjugated tensor, whose
  // strides are even: only where there is one element can it be laid out like a parameter. To ask them all would take a quarter
  // of a look's time; it is done where one was seen when note was taken.
  bool is_negated(PyObject* g) const {
    auto answer = pybind11::reinterpret_steal<pybind11::object>(
        PyObject_VectorcallMethod(is_neg_.ptr(), &g, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    if (!answer) throw pybind11::error_already_set();
    return answer.ptr() != Py_False;
  }

  // Written memory does not overlap: the first stretch that ends behind `start` is the only one to ask. Often it is that of the
  // gradient before; else a search without a branch, as nobody could predict it.
  bool is_clear(uintptr_t start, uintptr_t end) {
    const size_t count = ends_.size();
    if ((behind_ > 0 && ends_[behind_ - 1] > start) || (behind_ < count && ends_[behind_] <= start)) {
      behind_ = 0;
      for (size_t rest = count; rest;) {
        const size_t half = rest / 2;
        const bool before = ends_[behind_ + half] <= start;
        behind_ += before ? half + 1 : 0;
        rest = before ? rest - half - 1 : half;
      }
    }
    return start == end || behind_ == count || end <= starts_[behind_];
  }

  Exchange exchange_;
  int64_t small_;
  pybind11::str grad_{"grad"}, is_neg_{"is_neg"};
  std::vector<Param> params_;
  std::vector<size_t> ends_of_groups_;
  std::vector<int64_t> sizes_;
  std::vector<State> states_;
  std::vector<Entry> entries_;
  std::vector<Memory> memory_;            // of the state that is large enough to be asked for its addresses
  std::vector<uintptr_t> starts_, ends_;  // of the memory that is written
  size_t behind_ = 0;                     // the stretch that the last gradient was held against
  bool ask_all_ = false;                  // whether a gradient was a negation when note was taken
};

}  // namespace deeprelax
