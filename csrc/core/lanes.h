// The lane types of the formula, and their primitives for one lane.
//
// The headers of csrc/core are written once over a lane type: `float` and `uint32_t` on a GPU thread and in the portable CPU
// code, SIMD packs in csrc/cpu, or a `Twice` of any of them. What differs between lane types is only the primitives below: each
// is one correctly rounded operation or exact. Arithmetic is never contracted: compile with -ffp-contract=off or --fmad=false.
#pragma once

#include <cstdint>
#include <cstring>
#if !defined(__CUDA_ARCH__)
#include <cmath>
#endif

#if defined(__FAST_MATH__)
#error "deeprelax: -ffast-math changes bits; the numeric contract forbids it"
#endif

#if defined(__CUDACC__)
#define DR_FN __host__ __device__ __forceinline__
#define DR_INLINE_LAMBDA
#else
#define DR_FN inline __attribute__((always_inline))
#define DR_INLINE_LAMBDA __attribute__((always_inline))  // behind the parameters of a lambda
#endif

namespace deeprelax {

// ---- One lane ------------------------------------------------------------------------------------------------------------

DR_FN uint32_t bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
#endif
}

DR_FN float from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
#endif
}

DR_FN float square_root(float f) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(f);
#else
  return std::sqrt(f);
#endif
}

DR_FN double square_root(double f) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(f);
#else
  return std::sqrt(f);
#endif
}

DR_FN float from_unsigned(uint32_t u) { return static_cast<float>(u); }
DR_FN float from_signed(uint32_t u) { return static_cast<float>(static_cast<int32_t>(u)); }

template <int n>
DR_FN uint32_t shift_left(uint32_t u) {
  return u << n;
}
template <int n>
DR_FN uint32_t shift_right(uint32_t u) {
  return u >> n;
}
template <int n>
DR_FN uint32_t shift_right_signed(uint32_t u) {
  return static_cast<uint32_t>(static_cast<int32_t>(u) >> n);
}

// The sign bit of `flag` decides: picks `set` or `clear`; flips the sign of f.
DR_FN float choose(uint32_t flag, float set, float clear) { return static_cast<int32_t>(flag) < 0 ? set : clear; }
DR_FN float flip_sign(float f, uint32_t flag) { return from_bits(bits(f) ^ (flag & 0x80000000u)); }

// a > b (as signed integers) ? yes : no
DR_FN uint32_t where_greater(uint32_t a, uint32_t b, uint32_t yes, uint32_t no) {
  return static_cast<int32_t>(a) > static_cast<int32_t>(b) ? yes : no;
}

DR_FN double widen(float f) { return static_cast<double>(f); }

// ---- Twice: a lane type of two halves --------------------------------------------------------------------------------------
// Nested, it makes the bundles that keep several independent dependency chains in flight; a struct of two needs no loop and
// no array, so a compiler holds all of it in registers.

template <class L>
struct Lanes {  // how many elements a lane type holds
  static constexpr int count = L::lanes;
};
template <>
struct Lanes<float> {
  static constexpr int count = 1;
};
template <>
struct Lanes<double> : Lanes<float> {};
template <>
struct Lanes<uint32_t> : Lanes<float> {};

template <class L>
struct Twice {
  static constexpr int lanes = 2 * Lanes<L>::count;
  L lo, hi;

  Twice() = default;
  DR_FN Twice(L lo_, L hi_) : lo(lo_), hi(hi_) {}
  template <class S>
  DR_FN explicit Twice(S scalar) : lo(scalar), hi(scalar) {}
};

#define DR_LIFT_OPERATOR(op)                           \
  template <class L>                                   \
  DR_FN Twice<L> operator op(Twice<L> a, Twice<L> b) { \
    return Twice<L>(a.lo op b.lo, a.hi op b.hi);       \
  }
DR_LIFT_OPERATOR(+)
DR_LIFT_OPERATOR(-)
DR_LIFT_OPERATOR(*)
DR_LIFT_OPERATOR(&)
DR_LIFT_OPERATOR(|)
DR_LIFT_OPERATOR(^)
#undef DR_LIFT_OPERATOR

template <class L>
DR_FN Twice<L> operator-(Twice<L> a) {
  return Twice<L>(-a.lo, -a.hi);
}

#define DR_LIFT(function)                                                   \
  template <class L>                                                        \
  DR_FN auto function(Twice<L> a) -> Twice<decltype(function(a.lo))> {      \
    return Twice<decltype(function(a.lo))>(function(a.lo), function(a.hi)); \
  }
DR_LIFT(bits)
DR_LIFT(from_bits)
DR_LIFT(square_root)
DR_LIFT(from_unsigned)
DR_LIFT(from_signed)
DR_LIFT(widen)
#undef DR_LIFT

#define DR_LIFT_SHIFT(function)                            \
  template <int n, class L>                                \
  DR_FN Twice<L> function(Twice<L> a) {                    \
    return Twice<L>(function<n>(a.lo), function<n>(a.hi)); \
  }
DR_LIFT_SHIFT(shift_left)
DR_LIFT_SHIFT(shift_right)
DR_LIFT_SHIFT(shift_right_signed)
#undef DR_LIFT_SHIFT

template <class U, class F>
DR_FN Twice<F> choose(Twice<U> flag, Twice<F> set, Twice<F> clear) {
  return Twice<F>(choose(flag.lo, set.lo, clear.lo), choose(flag.hi, set.hi, clear.hi));
}
template <class F, class U>
DR_FN Twice<F> flip_sign(Twice<F> f, Twice<U> flag) {
  return Twice<F>(flip_sign(f.lo, flag.lo), flip_sign(f.hi, flag.hi));
}
template <class U>
DR_FN Twice<U> where_greater(Twice<U> a, Twice<U> b, Twice<U> yes, Twice<U> no) {
  return Twice<U>(where_greater(a.lo, b.lo, yes.lo, no.lo), where_greater(a.hi, b.hi, yes.hi, no.hi));
}

}  // namespace deeprelax
