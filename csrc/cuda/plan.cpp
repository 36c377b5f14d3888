// The launcher: from tensors to rows, from a step's numbers to a kernel.
#include <limits>
#include <utility>
#include <variant>
#include <vector>

#include "kernels.h"

namespace deeprelax::cuda {
namespace {

int size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// kPacket of the type of that size.
int packet_of(int size) { return size == 2 ? kPacket<BFloat16> : kPacket<float>; }

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();

bool divides_16(const void* role, int64_t elements, int size) {
  return !role || (reinterpret_cast<uintptr_t>(role) + static_cast<uintptr_t>(elements * size)) % 16 == 0;
}

// Fits the packets of a tensor to the addresses of its roles. `size` is that of y and g, `state_size` that of the others.
Row row_of(const Tensor& t, int size, int state_size) {
  Row row{t.y, t.g, t.x, t.m, t.v, t.w, t.c, t.master, t.numel, t.place, t.number, 0, 0, false, false, false, false};
  const void* const state[] = {t.x, t.m, t.v, t.w, t.c, t.master};
  int best = -1;
  for (int start = 0; start > -packet_of(size); --start) {
    bool aligned = true;
    for (const void* role : state) aligned = aligned && divides_16(role, start, state_size);
    const bool y_aligned = divides_16(t.y, start, size);
    const bool straight = t.place.run >= t.numel && (t.place.offset + start) % 4 == 0;
    const int good = 4 * aligned + 2 * straight + y_aligned;
    if (good <= best) continue;
    best = good;
    row.start = static_cast<int8_t>(start);
    row.aligned = aligned, row.straight = straight, row.y_aligned = y_aligned;
  }
  row.g_aligned = divides_16(t.g, row.start, size);
  return row;
}

// A launch: its arguments but for what a step adds, and how many blocks it takes.
template <class T>
struct Launch {
  Arguments<T> arguments;
  int64_t blocks;
};

template <class T>
using LaunchList = std::vector<Launch<T>>;

template <class T>
LaunchList<T> launches_of(Dtype dtype, const Tensor* tensors, int64_t count) {
  const int size = size_of(dtype);
  const int64_t per_block = int64_t(kThreads) * packet_of(size);
  LaunchList<T> launches;
  for (int64_t i = 0; i < count; ++i) {
    Row row = row_of(tensors[i], size, sizeof(T));
    const int64_t blocks = (row.numel - row.start + per_block - 1) / per_block;
    if (launches.empty() || launches.back().arguments.count == kRows || launches.back().blocks + blocks > kMostBlocks) {
      launches.emplace_back();
    }
    auto& [arguments, all] = launches.back();
    row.first_block = static_cast<uint32_t>(all);
    all += row.numel ? blocks : 0;
    arguments.rows[arguments.count++] = row;
  }
  return launches;
}

Kernel choose(const Kernels& all, const Step& step, bool has_master, bool stochastic, bool on_device) {
  const bool langevin = step.family == Family::langevin;
  if (!step.inner) return all.outer_step[on_device];
  if (on_device || step.outer || step.inv_scale || step.found_inf || step.maximize || has_master || stochastic) {
    return (langevin ? all.langevin_step_general : all.gradient_average_step_general)[on_device];
  }
  const bool noise = step.s != 0.0;
  if (!langevin) return all.gradient_average_step[noise];
  const bool everyday = step.k != 0.0 && step.a != 0.0 && step.a != 1.0;
  return everyday ? all.langevin_step[noise][step.mu != 0.0] : all.langevin_step_general[false];
}

template <class T>
void run(LaunchList<T>& launches, Dtype dtype, bool has_master, const Step& step, int device, void* stream,
         const void* const* grads, const Clock* clock) {
  if (!clock && !step.inner && !step.outer) return;  // a clock may still make it an outer step
  if (clock && device != kNoDevice) {
    const ClockArguments arguments{*clock, step};
    launch(advance_kernel(dtype), 1, 1, &arguments, device, stream);
  }
  const bool stochastic = dtype == Dtype::bfloat16 && step.rounding == Rounding::stochastic;
  const Kernel kernel = choose(kernels(dtype), step, has_master, stochastic, clock != nullptr);
  const int size = size_of(dtype);
  for (auto& [arguments, blocks] : launches) {
    arguments.numbers = {Scalars<T>(step), step.step};
    arguments.on_device = clock ? static_cast<const Numbers<T>*>(clock->numbers) : nullptr;
    arguments.inv_scale = static_cast<const T*>(step.inv_scale);
    arguments.found_inf = step.found_inf;
    arguments.seed = step.seed;
    arguments.stochastic = stochastic;
    if (grads) {
      for (int i = 0; i < arguments.count; ++i) {
        Row& row = arguments.rows[i];
        row.g = *grads++;
        row.g_aligned = divides_16(row.g, row.start, size);
      }
    }
    if (blocks > 0 && device != kNoDevice) launch(kernel, blocks, kThreads, &arguments, device, stream);
  }
}

}  // namespace

struct Plan::Launches {
  Dtype dtype;
  bool has_master = false;
  std::variant<LaunchList<float>, LaunchList<double>> lists;
};

Plan::Plan(Dtype dtype, const Tensor* tensors, int64_t count) : launches_(new Launches{dtype, false, {}}) {
  for (int64_t i = 0; i < count; ++i) launches_->has_master = launches_->has_master || tensors[i].master;
  if (dtype == Dtype::float64) {
    launches_->lists = launches_of<double>(dtype, tensors, count);
  } else {
    launches_->lists = launches_of<float>(dtype, tensors, count);
  }
}

Plan::Plan(Plan&&) noexcept = default;
Plan::~Plan() = default;

void Plan::step(const Step& step, int device, void* stream, const void* const* grads, const Clock* clock) {
  std::visit([&](auto& lists) { run(lists, launches_->dtype, launches_->has_master, step, device, stream, grads, clock); },
             launches_->lists);
}

void gaussian(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset, int device,
              void* cuda_stream) {
  constexpr int64_t per_block = int64_t(kThreads) * 4, most = kMostBlocks * per_block - 4;
  for (int64_t done = 0, n; done < numel; done += n) {
    n = numel - done < most ? numel - done : most;
    const GaussianArguments arguments{out + done, n, offset + done, seed, step, stream};
    launch(gaussian_kernel(), (((offset + done) & 3) + n + per_block - 1) / per_block, kThreads, &arguments, device,
           cuda_stream);
  }
}

}  // namespace deeprelax::cuda
