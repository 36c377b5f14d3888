// Sixteen bytes at a time: a packet of one role in registers, as bits and as lanes to compute with.
#pragma once

#include "../core/rounding.h"
#include "arguments.h"

#if defined(__CUDA_ARCH__)
#define DR_UNROLL _Pragma("unroll")
#define DR_ROLLED _Pragma("unroll 1")
#else
#define DR_UNROLL
#define DR_ROLLED
#endif

namespace deeprelax::cuda {

using Four = Twice<Twice<float>>;  // the lanes of one noise counter
using FourWords = Twice<Twice<uint32_t>>;

struct alignas(16) Line {
  uint32_t word[4];
};

// For g, which is read once.
DR_FN Line load_streaming(const Line* p) {
#if defined(__CUDA_ARCH__)
  const uint4 u = __ldcs(reinterpret_cast<const uint4*>(p));
  return Line{{u.x, u.y, u.z, u.w}};
#else
  return *p;
#endif
}

// Surely as one access: nvcc takes an assignment apart at will.
DR_FN void store(Line* p, const Line& line) {
#if defined(__CUDA_ARCH__)
  __stwb(reinterpret_cast<uint4*>(p), make_uint4(line.word[0], line.word[1], line.word[2], line.word[3]));
#else
  *p = line;
#endif
}

// ---- One element, bit for bit -----------------------------------------------------------------------------------------------

template <int size>
struct Unsigned;
template <>
struct Unsigned<2> {
  using type = uint16_t;
};
template <>
struct Unsigned<4> {
  using type = uint32_t;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
};
template <class S>
using Bits = typename Unsigned<sizeof(S)>::type;

DR_FN float value_of(uint32_t b, const float*) { return from_bits(b); }
DR_FN float value_of(uint16_t b, const BFloat16*) { return from_bits(static_cast<uint32_t>(b) << 16); }
DR_FN float value_of(uint16_t b, const Float16*) { return widen(Float16{b}); }
DR_FN double value_of(uint64_t b, const double*) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(b));
#else
  double d;
  std::memcpy(&d, &b, sizeof d);
  return d;
#endif
}

// What is stored has been rounded to its type before.
DR_FN uint32_t bits_of(float f, const float*) { return bits(f); }
DR_FN uint16_t bits_of(float f, const BFloat16*) { return static_cast<uint16_t>(bits(f) >> 16); }
DR_FN uint16_t bits_of(float f, const Float16*) { return nearest_float16(f).u; }
DR_FN uint64_t bits_of(double d, const double*) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(d));
#else
  uint64_t b;
  std::memcpy(&b, &d, sizeof b);
  return b;
#endif
}

// ---- A packet ---------------------------------------------------------------------------------------------------------------

// N elements of type S. Loops unroll and all indices become constants: what is indexed otherwise would lie in memory.
template <class S, int N>
struct Packet {
  static constexpr int kSize = static_cast<int>(sizeof(S));
  Line line[N * kSize / 16];

  DR_FN void read(const S* p) {
    DR_UNROLL
    for (int i = 0; i < N * kSize / 16; ++i) line[i] = reinterpret_cast<const Line*>(p)[i];
  }
  DR_FN void read_streaming(const S* p) {
    DR_UNROLL
    for (int i = 0; i < N * kSize / 16; ++i) line[i] = load_streaming(reinterpret_cast<const Line*>(p) + i);
  }
  DR_FN void write(S* p) const {
    DR_UNROLL
    for (int i = 0; i < N * kSize / 16; ++i) store(reinterpret_cast<Line*>(p) + i, line[i]);
  }

  // From and to an address that only the element's size divides.
  DR_FN void read_elements(const S* p) {
    DR_UNROLL
    for (int i = 0; i < N; ++i) set(i, reinterpret_cast<const Bits<S>*>(p)[i]);
  }
  DR_FN void write_elements(S* p) const {
    DR_UNROLL
    for (int i = 0; i < N; ++i) reinterpret_cast<Bits<S>*>(p)[i] = get(i);
  }

  // The lanes of elements 4 * group to 4 * group + 3.
  DR_FN auto lanes(int group) const {
    const S* type = nullptr;
    auto lane = [&](int i) { return value_of(get(4 * group + i), type); };
    using T = decltype(lane(0));
    return Twice<Twice<T>>(Twice<T>(lane(0), lane(1)), Twice<T>(lane(2), lane(3)));
  }
  template <class T>
  DR_FN void set_lanes(int group, const Twice<Twice<T>>& v) {
    const S* type = nullptr;
    set(4 * group, bits_of(v.lo.lo, type)), set(4 * group + 1, bits_of(v.lo.hi, type));
    set(4 * group + 2, bits_of(v.hi.lo, type)), set(4 * group + 3, bits_of(v.hi.hi, type));
  }

 private:
  DR_FN uint32_t& word(int i) { return line[i / 4].word[i % 4]; }
  DR_FN uint32_t word(int i) const { return line[i / 4].word[i % 4]; }

  DR_FN Bits<S> get(int i) const {
    if constexpr (kSize == 2) {
      return static_cast<uint16_t>(word(i / 2) >> (i % 2 * 16));
    } else if constexpr (kSize == 4) {
      return word(i);
    } else {
      return static_cast<uint64_t>(word(2 * i + 1)) << 32 | word(2 * i);
    }
  }
  DR_FN void set(int i, Bits<S> b) {
    if constexpr (kSize == 2) {
      word(i / 2) = i % 2 ? word(i / 2) | static_cast<uint32_t>(b) << 16 : b;  // the lower half is set first
    } else if constexpr (kSize == 4) {
      word(i) = b;
    } else {
      word(2 * i) = static_cast<uint32_t>(b), word(2 * i + 1) = static_cast<uint32_t>(b >> 32);
    }
  }
};

}  // namespace deeprelax::cuda
