// What a launch of a step kernel is told, by value: up to 32 KB of arguments, so that no table lies on the device, nothing is
// allocated or copied ahead of a step, and a captured graph holds all it needs.
#pragma once

#include "../core/clock.h"

namespace deeprelax::cuda {

constexpr int kThreads = 256;             // of a block
constexpr int kRows = 288;                // tensors of a launch
constexpr int kLargestArguments = 32764;  // bytes, of CUDA 12.1 and later from sm_70 on

// A packet is what a thread works on at a time: N elements, so that accesses are of 16 bytes for every type.
template <class Stored>
constexpr int kPacket = sizeof(Stored) == 2 ? 8 : 4;

// One tensor of a launch. A role that plays no part is null.
//
// Packet p is elements start + p * N to start + (p + 1) * N - 1. It begins where the state (x, m, v, w, c, master) has
// addresses that 16 divides; y and g, which others allocate, may be unaligned there and are then accessed by the element. Where
// there is no such place, or where the packets of a noisy step are not of whole noise counters, all of the row is worked on by
// the element: the noise belongs to the element, whatever its address.
struct Row {
  void* y;
  const void* g;
  void *x, *m, *v, *w;
  const void* c;
  void* master;
  int64_t numel;
  Place place;
  uint32_t number;                     // of the noise stream
  uint32_t first_block;                // of the launch that works on this tensor; it has the blocks up to the next tensor's
  int8_t start;                        // of packet 0, in (-N, 0]
  bool aligned, y_aligned, g_aligned;  // whether 16 divides the addresses of packets: of the state, of y, of g
  bool straight;                       // whether packets are of whole noise counters
};

template <class T>
struct Arguments {
  Numbers<T> numbers;           // of the call
  const Numbers<T>* on_device;  // where a clock has left them, for the kernels that look there
  const T* inv_scale;           // null: the gradients are as they are
  const float* found_inf;       // null: the step is taken
  uint64_t seed;
  bool stochastic;  // rounding
  int32_t count;    // rows in use
  Row rows[kRows];
};

static_assert(sizeof(Arguments<double>) <= kLargestArguments && sizeof(Arguments<float>) <= kLargestArguments);
static_assert(sizeof(Numbers<double>) <= kClockNumbers);

}  // namespace deeprelax::cuda
