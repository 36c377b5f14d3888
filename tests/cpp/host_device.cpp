// A host in the place of a GPU (tests/test_cuda_on_host.py): the kernels' own bodies, called by the launcher itself, every
// thread of every block in turn. What csrc/cuda/device.cu leaves to the CUDA runtime is done here by loops.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernels.h"

namespace deeprelax::cuda {
namespace {

// What a kernel points to here.
using HostKernel = void (*)(const void* arguments, int64_t first, int64_t end, int threads);

// What was launched since `host_watch`, and what of it is left out: blocks of tensors that are too large to exist.
struct Watched {
  std::vector<int64_t> blocks;  // of each launch
  int64_t rows[4] = {};         // of step kernels: with aligned state, aligned y, aligned g, packets of whole noise counters
  int64_t only = -1, first = 0, end = 0;
} watched;

template <class Body>
void loop(int64_t first, int64_t end, int threads, const Body& body) {
  for (int64_t block = first; block < end; ++block) {
    for (int thread = 0; thread < threads; ++thread) body(static_cast<uint32_t>(block), static_cast<uint32_t>(thread));
  }
}

template <class Kind>
void step_kernel(const void* arguments, int64_t first, int64_t end, int threads) {
  using T = typename ComputeType<typename Kind::Stored>::type;
  const auto& args = *static_cast<const Arguments<T>*>(arguments);
  std::for_each(args.rows, args.rows + args.count, [](const Row& row) {
    const bool is[] = {row.aligned, row.y_aligned, row.g_aligned, row.straight};
    for (int i = 0; i < 4; ++i) watched.rows[i] += is[i];
  });
  loop(first, end, threads, [&](uint32_t block, uint32_t thread) { step_body<Kind>(args, block, thread); });
}

template <class T>
void advance_clock(const void* arguments, int64_t first, int64_t end, int threads) {
  loop(first, end, threads, [&](uint32_t, uint32_t) { advance_body<T>(*static_cast<const ClockArguments*>(arguments)); });
}

void gaussian_blocks(const void* arguments, int64_t first, int64_t end, int threads) {
  const auto& args = *static_cast<const GaussianArguments*>(arguments);
  loop(first, end, threads, [&](uint32_t block, uint32_t thread) { gaussian_body(args, block, thread); });
}

template <class Kind>
struct StepKernel {
  static Kernel kernel() { return reinterpret_cast<Kernel>(&step_kernel<Kind>); }
};

template <class Stored>
const Kernels& host_kernels() {
  static const Kernels all = kernels_of<Stored, StepKernel, StepKernel, StepKernel>();
  return all;
}

}  // namespace

const Kernels& kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return host_kernels<double>();
    case Dtype::bfloat16:
      return host_kernels<BFloat16>();
    case Dtype::float16:
      return host_kernels<Float16>();
    default:
      return host_kernels<float>();
  }
}

Kernel advance_kernel(Dtype dtype) {
  return dtype == Dtype::float64 ? reinterpret_cast<Kernel>(&advance_clock<double>)
                                 : reinterpret_cast<Kernel>(&advance_clock<float>);
}

Kernel gaussian_kernel() { return reinterpret_cast<Kernel>(&gaussian_blocks); }

// Refuses what the runtime refuses. The host is device 0, and has no streams.
void launch(Kernel kernel, int64_t blocks, int threads, const void* arguments, int device, void* stream) {
  if (device != 0 || stream) throw std::runtime_error("deeprelax: no such device or stream");
  if (blocks < 1 || blocks > std::numeric_limits<int32_t>::max() || threads < 1 || threads > 1024) {
    throw std::runtime_error("deeprelax: a launch of " + std::to_string(blocks) + " blocks");
  }
  const bool all = watched.only < 0, some = watched.only == static_cast<int64_t>(watched.blocks.size());
  watched.blocks.push_back(blocks);
  const int64_t first = all ? 0 : watched.first, end = all ? blocks : std::min(watched.end, blocks);
  if (all || some) reinterpret_cast<HostKernel>(const_cast<void*>(kernel))(arguments, first, end, threads);
}

std::string unavailable(int) { return ""; }

}  // namespace deeprelax::cuda

using deeprelax::cuda::watched;

extern "C" {

// Forgets what was launched. From now on all blocks run (only < 0), or those from `first` to before `end` of launch `only`.
__attribute__((visibility("default"))) void host_watch(int64_t only, int64_t first, int64_t end) {
  watched = {{}, {}, only, first, end};
}

// Copies the blocks of the first `most` launches; returns how many launches there were.
__attribute__((visibility("default"))) int64_t host_launches(int64_t* blocks, int64_t most) {
  const auto count = static_cast<int64_t>(watched.blocks.size());
  std::copy_n(watched.blocks.begin(), std::min(count, most), blocks);
  return count;
}

// Copies how many rows there were with each of the properties of Watched::rows.
__attribute__((visibility("default"))) void host_rows(int64_t* rows) {
  std::copy(std::begin(watched.rows), std::end(watched.rows), rows);
}

// Reads a packet, wherever that is: what the sanitizers must report.
__attribute__((visibility("default"))) uint32_t host_read(const float* address) {
  deeprelax::cuda::Packet<float, 4> packet;
  packet.read(address);
  return packet.line[0].word[3];
}
}
