// The body of every step kernel, as a function of block and thread: a GPU runs it in parallel, tests run it in a loop.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "../core/gaussian.h"
#include "packet.h"

namespace deeprelax::cuda {

// ---- What is settled when a kernel is compiled ------------------------------------------------------------------------------
// The formula asks its numbers which terms there are. Each kind of kernel pins some of the answers, so that the others' code
// and registers are not in it; what it leaves open is a branch that all threads take alike. `blocks_per_sm` is how many of its
// blocks an SM holds at a time, which bounds the registers of a thread: as many as leave nothing to spill on any architecture.

// Lets the compiler know what the launcher has seen to (choose() in plan.cpp).
DR_FN void assume(bool fact) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(fact);
#else
  if (!fact) std::abort();
#endif
}

// Lets the compiler know that a number is 0, or that it is not.
template <bool zero, class T>
DR_FN void pin_zero(T& number) {
  if (zero) {
    number = T(0);
  } else {
    assume(number != T(0));
  }
}

// A Langevin step of every day: coupled to the anchor, with an average that remembers.
template <class Stored_, bool noise, bool momentum>
struct PlainLangevin {
  using Stored = Stored_;
  static constexpr bool everything = false, on_device = false;
  static constexpr int blocks_per_sm = sizeof(Stored) == 8   ? (noise && momentum ? 2 : 3)
                                       : sizeof(Stored) == 2 ? (noise && momentum ? 3 : 4)
                                                             : (momentum ? (noise ? 4 : 5) : 6);
  template <class T>
  static DR_FN void pin(Scalars<T>& h) {
    h.family = Family::langevin;
    h.inner = true, h.outer = false, h.scaled = false, h.maximize = false;
    pin_zero<!noise>(h.s);
    pin_zero<!momentum>(h.mu);
    if (!momentum) h.coupling_in_momentum = false;  // without it, the coupling has one place
    assume(h.k != T(0));
    assume(h.a != T(0));
    assume(h.a != T(1));
  }
};

template <class Stored_, bool noise>
struct PlainGradientAverage {
  using Stored = Stored_;
  static constexpr bool everything = false, on_device = false;
  static constexpr int blocks_per_sm = sizeof(Stored) == 8 ? 3 : sizeof(Stored) == 2 ? (noise ? 3 : 4) : noise ? 5 : 6;
  template <class T>
  static DR_FN void pin(Scalars<T>& h) {
    h.family = Family::gradient_average;
    h.inner = true, h.outer = false, h.scaled = false, h.maximize = false;
    pin_zero<!noise>(h.s);
  }
};

// Everything else: no coupling, an average that forgets or takes nothing, gradient scaling, maximize, masters, stochastic
// rounding, the outer step in the same pass; with the numbers in the arguments or, for a step with a clock, on the device.
template <class Stored_, Family family_, bool on_device_>
struct General {
  using Stored = Stored_;
  static constexpr bool everything = true, on_device = on_device_;
  static constexpr int blocks_per_sm = sizeof(Stored) == 4 ? 2 : 1;
  template <class T>
  static DR_FN void pin(Scalars<T>& h) {
    h.family = family_;
    h.inner = true;
  }
};

// The outer step by itself, of either family.
template <class Stored_, bool on_device_>
struct Outer {
  using Stored = Stored_;
  static constexpr bool everything = true, on_device = on_device_;
  static constexpr int blocks_per_sm = sizeof(Stored) == 4 ? 2 : 1;
  template <class T>
  static DR_FN void pin(Scalars<T>& h) {
    h.inner = false;
    if (!on_device) h.outer = true;
  }
};

// ---- One group of elements --------------------------------------------------------------------------------------------------

// The roles of a row in their types.
template <class Kind>
struct Roles {
  using Stored = typename Kind::Stored;
  using T = typename ComputeType<Stored>::type;
  Stored* y;
  const Stored* g;
  T *x, *m, *v, *w;
  const T* c;
  T* master;

  DR_FN explicit Roles(const Row& row)
      : y(static_cast<Stored*>(row.y)),
        g(static_cast<const Stored*>(row.g)),
        x(static_cast<T*>(row.x)),
        m(static_cast<T*>(row.m)),
        v(static_cast<T*>(row.v)),
        w(static_cast<T*>(row.w)),
        c(static_cast<const T*>(row.c)),
        master(Kind::everything ? static_cast<T*>(row.master) : nullptr) {}
};

// A call, as its threads see it.
template <class Kind>
struct Call {
  using T = typename ComputeType<typename Kind::Stored>::type;
  Scalars<T> h;
  uint32_t step;
  uint64_t seed;
  bool stochastic;

  DR_FN explicit Call(const Arguments<T>& args) {
    const Numbers<T>& numbers = Kind::on_device ? *args.on_device : args.numbers;
    h = numbers.scalars;
    if (args.inv_scale) h.inv_scale = *args.inv_scale;
    Kind::pin(h);
    step = numbers.step;
    seed = args.seed;
    stochastic = Kind::everything && std::is_same_v<typename Kind::Stored, BFloat16> && args.stochastic;
  }

  DR_FN Words<uint32_t> words(uint64_t q, uint32_t stream) const {
    return philox4x32<uint32_t>(Key(seed), static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), step, stream);
  }
  DR_FN Four normal(uint64_t q, const Row& row) const { return h.noisy() ? normals(words(q, row.number)) : Four(0.0f); }
  DR_FN FourWords random(uint64_t q, const Row& row) const {
    return stochastic ? words_in_order(words(q, row.number | kDomainRounding)) : FourWords(0u);
  }

  // Takes the step on lanes V of elements whose y is, where it has a master, that of the master.
  template <class V, class Z, class U>
  DR_FN void take(Element<V>& t, const Z& normal, const U& random, bool has_master) const {
    const typename Kind::Stored* type = nullptr;
    V z;
    if constexpr (std::is_same_v<T, double>) {
      z = widen(normal);
    } else {
      z = normal;
    }
    take_step(h, t, z, [&](V y) {
      if (has_master) return y;
      if constexpr (std::is_same_v<typename Kind::Stored, BFloat16>) {
        if (stochastic) return from_bits(stochastic_bfloat16(bits(y), random));
      }
      return stored_as(y, type);
    });
  }
};

// Packet elements j to j + N - 1, of a row whose state is aligned. The loads come first: memory works while the noise is
// computed.
template <class Kind, class T, bool aligned>
DR_FN void take_packet(const Call<Kind>& call, const Row& row, int64_t j) {
  using Stored = typename Kind::Stored;
  constexpr int N = kPacket<Stored>;
  const Scalars<T>& h = call.h;
  const Roles<Kind> at(row);
  Packet<Stored, N> y, g;
  Packet<T, N> x, m, v, w, c, master;
  if (h.reads_y()) {
    if (at.master) {
      master.read(at.master + j);
    } else {
      aligned || row.y_aligned ? y.read(at.y + j) : y.read_elements(at.y + j);
    }
  }
  if (h.inner) aligned || row.g_aligned ? g.read_streaming(at.g + j) : g.read_elements(at.g + j);
  if (h.reads_x()) x.read(at.x + j);
  if (h.reads_m()) m.read(at.m + j);
  if (h.has_v()) v.read(at.v + j);
  if (h.has_w()) w.read(at.w + j);
  if (h.reads_c()) c.read(at.c + j);

  DR_UNROLL
  for (int group = 0; group < N / 4; ++group) {
    const uint64_t q = (static_cast<uint64_t>(row.place.offset + j) >> 2) + group;
    Element<Twice<Twice<T>>> t{};
    if (h.reads_y()) t.y = at.master ? master.lanes(group) : y.lanes(group);
    if (h.inner) t.g = g.lanes(group);
    if (h.reads_x()) t.x = x.lanes(group);
    if (h.reads_m()) t.m = m.lanes(group);
    if (h.has_v()) t.v = v.lanes(group);
    if (h.has_w()) t.w = w.lanes(group);
    if (h.reads_c()) t.c = c.lanes(group);
    call.take(t, call.normal(q, row), call.random(q, row), at.master);
    if (at.master) {
      master.set_lanes(group, t.y);
      t.y = stored_as(t.y, at.y);
    }
    y.set_lanes(group, t.y);
    if (h.outer) x.set_lanes(group, t.x);
    if (h.writes_m()) m.set_lanes(group, t.m);
    if (h.has_v()) v.set_lanes(group, t.v);
    if (h.has_w()) w.set_lanes(group, t.w);
  }

  if (at.master) master.write(at.master + j);
  aligned || row.y_aligned ? y.write(at.y + j) : y.write_elements(at.y + j);
  if (h.outer) x.write(at.x + j);
  if (h.writes_m()) m.write(at.m + j);
  if (h.has_v()) v.write(at.v + j);
  if (h.has_w()) w.write(at.w + j);
}

DR_FN int64_t global_index(const Place& place, int64_t j) {
  if (j < place.run) return place.offset + j;  // a whole tensor, or a shard of its rows
  return place.offset + j / place.run * place.pitch + j % place.run;
}

template <class L>
DR_FN L lane_of(const Twice<Twice<L>>& four, uint64_t lane) {
  const L low = lane & 1 ? four.lo.hi : four.lo.lo, high = lane & 1 ? four.hi.hi : four.hi.lo;
  return lane & 2 ? high : low;
}

// Elements j to end - 1 one by one: the ragged ends of a tensor, and all of a row whose packets do not fit its
// memory or its noise.
template <class Kind, class T>
DR_FN void take_elements(const Call<Kind>& call, const Row& row, int64_t j, int64_t end) {
  using Stored = typename Kind::Stored;
  const Scalars<T>& h = call.h;
  const Roles<Kind> at(row);
  const Stored* type = nullptr;
  auto value = [&](const Stored& stored) { return value_of(reinterpret_cast<const Bits<Stored>&>(stored), type); };
  uint64_t have = ~uint64_t(0);  // the counter of `normal` and `random`
  Four normal(0.0f);
  FourWords random(0u);
  DR_ROLLED
  for (; j < end; ++j) {
    const uint64_t i = static_cast<uint64_t>(global_index(row.place, j));
    if (have != i >> 2) {
      have = i >> 2;
      normal = call.normal(have, row);
      random = call.random(have, row);
    }
    Element<T> t{};
    if (h.reads_y()) t.y = at.master ? at.master[j] : value(at.y[j]);
    if (h.inner) t.g = value(at.g[j]);
    if (h.reads_x()) t.x = at.x[j];
    if (h.reads_m()) t.m = at.m[j];
    if (h.has_v()) t.v = at.v[j];
    if (h.has_w()) t.w = at.w[j];
    if (h.reads_c()) t.c = at.c[j];
    call.take(t, lane_of(normal, i & 3), lane_of(random, i & 3), at.master);
    if (at.master) {
      at.master[j] = t.y;
      t.y = stored_as(t.y, type);
    }
    reinterpret_cast<Bits<Stored>&>(at.y[j]) = bits_of(t.y, type);
    if (h.outer) at.x[j] = t.x;
    if (h.writes_m()) at.m[j] = t.m;
    if (h.has_v()) at.v[j] = t.v;
    if (h.has_w()) at.w[j] = t.w;
  }
}

// ---- One block --------------------------------------------------------------------------------------------------------------

DR_FN bool skipped(const float* found_inf) { return found_inf && *found_inf != 0.0f; }  // NaN counts

// The row whose blocks `block` is one of.
template <class T>
DR_FN const Row& row_of(const Arguments<T>& args, uint32_t block) {
  int low = 0, high = args.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (args.rows[middle].first_block <= block ? low : high) = middle;
  }
  return args.rows[low];
}

template <class Kind, class T = typename ComputeType<typename Kind::Stored>::type>
DR_FN void step_body(const Arguments<T>& args, uint32_t block, uint32_t thread) {
  constexpr int N = kPacket<typename Kind::Stored>;
  if (Kind::everything && skipped(args.found_inf)) return;
  const Call<Kind> call(args);
  if (!call.h.inner && !call.h.outer) return;

  const Row& row = row_of(args, block);
  const int64_t j = row.start + (static_cast<int64_t>(block - row.first_block) * kThreads + thread) * N;
  const bool whole_counters = row.straight || !(call.h.noisy() || call.stochastic);
  // A negative j, of a packet that begins before the tensor, is a large unsigned one.
  const bool inside = row.numel >= N && static_cast<uint64_t>(j) <= static_cast<uint64_t>(row.numel - N);
  if (row.aligned && whole_counters && inside) {
    if (row.y_aligned && row.g_aligned) {
      take_packet<Kind, T, true>(call, row, j);
    } else {
      take_packet<Kind, T, false>(call, row, j);
    }
  } else {
    take_elements<Kind, T>(call, row, j < 0 ? 0 : j, j + N < row.numel ? j + N : row.numel);
  }
}

// ---- The numbers of a step with a clock -------------------------------------------------------------------------------------

struct ClockArguments {
  Clock clock;
  Step step;
};

// One thread.
template <class T>
DR_FN void advance_body(const ClockArguments& args) {
  if (!skipped(args.step.found_inf)) *static_cast<Numbers<T>*>(args.clock.numbers) = advance<T>(args.clock, args.step);
}

// ---- Normals by themselves --------------------------------------------------------------------------------------------------

struct GaussianArguments {
  float* out;
  int64_t numel, offset;
  uint64_t seed;
  uint32_t step, stream;
};

DR_FN void gaussian_body(const GaussianArguments& args, uint32_t block, uint32_t thread) {
  const int64_t lead = args.offset & 3;  // elements of the first counter that come before the offset
  const int64_t n = static_cast<int64_t>(block) * kThreads + thread;
  const int64_t j = 4 * n - lead, left = args.numel - j;
  if (left <= 0) return;
  const uint64_t q = (static_cast<uint64_t>(args.offset) >> 2) + static_cast<uint64_t>(n);
  const Four z = normals(
      philox4x32<uint32_t>(Key(args.seed), static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), args.step, args.stream));
  if (lead == 0 && left >= 4 && reinterpret_cast<uintptr_t>(args.out) % sizeof(Line) == 0) {
    Packet<float, 4> packet;
    packet.set_lanes(0, z);
    packet.write(args.out + j);
  } else {
    DR_ROLLED
    for (int lane = 0; lane < 4; ++lane) {
      if (j + lane >= 0 && lane < left) args.out[j + lane] = lane_of(z, lane);
    }
  }
}

}  // namespace deeprelax::cuda
