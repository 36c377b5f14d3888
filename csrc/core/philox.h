// Philox4x32-10: the counter-based generator behind all noise.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include "lanes.h"

namespace deeprelax {

// Domains of streams: stream = domain * 2^28 + tensor number.
constexpr uint32_t kDomainRounding = 1u << 28;

struct Key {
  uint32_t k0, k1;

  DR_FN explicit Key(uint64_t seed) : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}
};

// Four words for each counter that the word type W holds. A pack keeps a word in the low half of a 64-bit lane, and whatever is
// in the high half is ignored: the widening multiplication reads the low half only, so nothing is repacked between rounds.
template <class W>
struct Words {
  W w0, w1, w2, w3;
};

DR_FN uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t p;  // from `*`, nvcc makes a product of 64-bit factors, with one more instruction to add the upper half of zero
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(p) : "r"(a), "r"(b));
  return p;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}
DR_FN uint32_t high_word(uint64_t p) { return static_cast<uint32_t>(p >> 32); }
DR_FN uint32_t low_word(uint64_t p) { return static_cast<uint32_t>(p); }
DR_FN uint32_t exclusive_or(uint32_t a, uint32_t b, uint32_t c) { return a ^ b ^ c; }
DR_FN void count_up(uint32_t& w, uint32_t q) { w = q; }

template <class W>
DR_FN auto wide_product(Twice<W> a, uint32_t b) -> Twice<decltype(wide_product(a.lo, b))> {
  return Twice<decltype(wide_product(a.lo, b))>(wide_product(a.lo, b), wide_product(a.hi, b));
}
template <class P>
DR_FN auto high_word(Twice<P> p) -> Twice<decltype(high_word(p.lo))> {
  return Twice<decltype(high_word(p.lo))>(high_word(p.lo), high_word(p.hi));
}
template <class P>
DR_FN auto low_word(Twice<P> p) -> Twice<decltype(low_word(p.lo))> {
  return Twice<decltype(low_word(p.lo))>(low_word(p.lo), low_word(p.hi));
}
template <class W>
DR_FN Twice<W> exclusive_or(Twice<W> a, Twice<W> b, uint32_t c) {
  return Twice<W>(exclusive_or(a.lo, b.lo, c), exclusive_or(a.hi, b.hi, c));
}
template <class W>
DR_FN void count_up(Twice<W>& w, uint32_t q) {
  count_up(w.lo, q);
  count_up(w.hi, q + Lanes<W>::count);
}

// The words of counters (q + j, q_high, step, stream), j = 0, 1, ... up to the lanes of W; q + j must not pass 2^32.
template <class W>
DR_FN Words<W> philox4x32(Key key, uint32_t q, uint32_t q_high, uint32_t step, uint32_t stream) {
  W c0, c1(q_high), c2(step), c3(stream);
  count_up(c0, q);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    auto p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
    c0 = exclusive_or(high_word(p1), c1, key.k0);
    c1 = low_word(p1);
    c2 = exclusive_or(high_word(p0), c3, key.k1);
    c3 = low_word(p0);
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  return Words<W>{c0, c1, c2, c3};
}

}  // namespace deeprelax
