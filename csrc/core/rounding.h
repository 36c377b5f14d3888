// Storage types and their rounding. A narrow value is handled as the float32 it widens to; what is rounded is its bit pattern.
#pragma once

#include "lanes.h"

namespace deeprelax {

struct BFloat16 {  // the upper half of a float32
  uint16_t u;
};
struct Float16 {  // IEEE binary16
  uint16_t u;
};

template <class Stored>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

//   float32   s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm
//   bfloat16  s eeeeeeee mmmmmmm                    the lower 16 bits decide: > half up, half to even (bit 16 zero)
// Both functions return the float32 pattern of the bfloat16. The sums never carry beyond the exponent of a finite number, and a
// NaN is cut, not added to: adding would turn some NaNs into -0.
template <class U>
DR_FN U nearest_bfloat16(U b) {
  U rounded = b + U(0x7FFFu) + (shift_right<16>(b) & U(1u));
  return where_greater(b & U(0x7FFFFFFFu), U(0x7F800000u), b | U(0x400000u), rounded) & U(0xFFFF0000u);
}

// Up with the probability of the cut-off part; w is a random word. The largest finite number is never rounded to infinity.
template <class U>
DR_FN U stochastic_bfloat16(U b, U w) {
  U magnitude = b & U(0x7FFFFFFFu);
  U rounded = b + shift_right<16>(w);
  rounded = where_greater(rounded & U(0x7FFFFFFFu), U(0x7F7FFFFFu), (b & U(0x80000000u)) | U(0x7F7F0000u), rounded);
  rounded = where_greater(magnitude, U(0x7F7FFFFFu), b, rounded);  // infinity
  return where_greater(magnitude, U(0x7F800000u), b | U(0x400000u), rounded) & U(0xFFFF0000u);
}

DR_FN float widen(Float16 h) {
  uint32_t magnitude = h.u & 0x7FFFu;
  uint32_t b = bits(from_bits(magnitude << 13) * 0x1p112f);  // exact: moves the exponent's bias, subnormals included
  if (magnitude >= 0x7C00u) b = magnitude << 13 | 0x7F800000u;
  return from_bits(b | (h.u & 0x8000u) << 16);
}

DR_FN Float16 nearest_float16(float f) {
  uint32_t b = bits(f), magnitude = b & 0x7FFFFFFFu, h;
  if (magnitude > 0x7F800000u) {
    h = 0x7E00u;  // NaN
  } else if (magnitude >= 0x477FF000u) {
    h = 0x7C00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    h = bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;  // subnormal: the ulp of 0.5 is the spacing of binary16 there
  } else {
    h = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  }
  return Float16{static_cast<uint16_t>((b >> 16 & 0x8000u) | h)};
}

// What a value becomes when it is stored as `Stored`, to nearest even.
DR_FN float stored_as(float f, const float*) { return f; }
DR_FN double stored_as(double f, const double*) { return f; }
DR_FN float stored_as(float f, const Float16*) { return widen(nearest_float16(f)); }
template <class L, class Stored>
DR_FN Twice<L> stored_as(Twice<L> f, const Stored* type) {
  return Twice<L>(stored_as(f.lo, type), stored_as(f.hi, type));
}
template <class F>
DR_FN F stored_as(F f, const BFloat16*) {
  return from_bits(nearest_bfloat16(bits(f)));
}
template <class L>
DR_FN Twice<L> stored_as(Twice<L> f, const BFloat16* type) {  // more special than either of the above
  return Twice<L>(stored_as(f.lo, type), stored_as(f.hi, type));
}

}  // namespace deeprelax
