// Standard normals from Philox words by the Box-Muller transform, in float32 with one rounding an operation.
//
// The constants are binding: another backend with other constants would give other bits. tools/derive_gaussian.py derives them
// and checks their errors exhaustively (rho within 2.3 ulp, sine and cosine within 0.9 ulp of 1).
#pragma once

#include "philox.h"

namespace deeprelax {

// -2 ln(1 - g) = g * (2 + g * (L0 + L1 g + ... + L6 g^6)) on [1 - sqrt(2), 1 - sqrt(1/2)];  NL2 = -2 ln 2
constexpr float NL2 = -0x1.62e43p+0f;
constexpr float L0 = 0x1.00003ap+0f, L1 = 0x1.555c5ap-1f, L2 = 0x1.ff8102p-2f, L3 = 0x1.970512p-2f, L4 = 0x1.5fc3fep-2f,
                L5 = 0x1.4faa02p-2f, L6 = 0x1.adf5bep-3f;
// sine and cosine on [-pi/4, pi/4];  KA = 2 pi / 2^34
constexpr float KA = 0x1.921fb6p-32f;
constexpr float S1 = -0x1.55554p-3f, S2 = 0x1.1105bep-7f, S3 = -0x1.98dd16p-13f;
constexpr float C1 = -0x1.ffffbap-2f, C2 = 0x1.553faap-5f, C3 = -0x1.64782ap-10f;

// Two normals for each pair of words: rho(w0) * cos(theta(w1)) and rho(w0) * sin(theta(w1)).
template <class F, class U>
DR_FN void box_muller(U w0, U w1, F& lane0, F& lane1) {
  // rho = sqrt(-2 ln u), u = (w0 + 1/2) / 2^32, from u = 2^e (1 - g) with 1 - g in [sqrt(1/2), sqrt(2))
  F v = from_unsigned(w0) + F(0.5f);
  U i = bits(v) - U(0x4F3504F3u);
  F e = from_signed(shift_right_signed<23>(i));
  F g = F(1.0f) - from_bits((i & U(0x7FFFFFu)) + U(0x3F3504F3u));
  F p(L6);
  p = p * g + F(L5);
  p = p * g + F(L4);
  p = p * g + F(L3);
  p = p * g + F(L2);
  p = p * g + F(L1);
  p = p * g + F(L0);
  F t = e * F(NL2) + g * (F(2.0f) + g * p);
  F rho = square_root(t);

  // theta = quadrant * pi/2 + a: the top two bits of w1 are the quadrant, the others a
  F a = from_signed(shift_left<2>(w1)) * F(KA);
  F z = a * a;
  F sn = a * (F(1.0f) + z * (F(S1) + z * (F(S2) + z * F(S3))));
  F cs = F(1.0f) + z * (F(C1) + z * (F(C2) + z * F(C3)));
  U odd = shift_left<1>(w1);
  F first = flip_sign(choose(odd, sn, cs), w1 ^ odd);
  F second = flip_sign(choose(odd, cs, sn), w1);
  lane0 = rho * first;
  lane1 = rho * second;
}

// From words to storage order. For one counter: merge puts (w0, w2) and (w1, w3) side by side, so that one box_muller serves
// both pairs, and interleave puts what comes out, lanes (0, 2) and (1, 3), into the order 0, 1, 2, 3. A pack does as much for
// all its counters at once.
DR_FN Twice<uint32_t> merge(uint32_t a, uint32_t b) { return Twice<uint32_t>(a, b); }
DR_FN Twice<float> interleave(float a, float b) { return Twice<float>(a, b); }
DR_FN Twice<uint32_t> interleave(uint32_t a, uint32_t b) { return Twice<uint32_t>(a, b); }

template <class W>
DR_FN auto merge(Twice<W> a, Twice<W> b) -> Twice<decltype(merge(a.lo, b.lo))> {
  return Twice<decltype(merge(a.lo, b.lo))>(merge(a.lo, b.lo), merge(a.hi, b.hi));
}
template <class L>
DR_FN auto interleave(Twice<L> a, Twice<L> b) -> Twice<decltype(interleave(a.lo, b.lo))> {
  return Twice<decltype(interleave(a.lo, b.lo))>(interleave(a.lo, b.lo), interleave(a.hi, b.hi));
}

// The normals of the elements 4q, 4q + 1, ... in storage order.
template <class W>
DR_FN auto normals(Words<W> w) {
  auto radius = merge(w.w0, w.w2), angle = merge(w.w1, w.w3);
  decltype(from_unsigned(radius)) first, second;
  box_muller(radius, angle, first, second);
  return interleave(first, second);
}

// The words themselves, in storage order: word i mod 4 of counter i div 4.
template <class W>
DR_FN auto words_in_order(Words<W> w) {
  return interleave(merge(w.w0, w.w2), merge(w.w1, w.w3));
}

}  // namespace deeprelax
