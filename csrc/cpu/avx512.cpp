// The CPU kernels for AVX-512 (F, BW, DQ, VL).
#include <immintrin.h>

#include <type_traits>

#include "../core/philox.h"
#include "../core/rounding.h"

namespace deeprelax::cpu {
namespace {

// 8 counters' words, each in the low half of a 64-bit lane. Counters go 0 4 1 5 2 6 3 7, so that merge and interleave, which
// work within 128 bits, end in storage order.
struct WordPack {
  static constexpr int lanes = 8;
  __m512i u;
  DR_FN WordPack(__m512i u_) : u(u_) {}
  DR_FN explicit WordPack(uint32_t w) : u(_mm512_set1_epi64(w)) {}
  WordPack() = default;
};
struct IntPack {
  static constexpr int lanes = 16;
  __m512i u;
  DR_FN IntPack(__m512i u_) : u(u_) {}
  DR_FN explicit IntPack(uint32_t w) : u(_mm512_set1_epi32(static_cast<int>(w))) {}
  IntPack() = default;
};
struct FloatPack {
  static constexpr int lanes = 16;
  __m512 f;
  DR_FN FloatPack(__m512 f_) : f(f_) {}
  DR_FN explicit FloatPack(float s) : f(_mm512_set1_ps(s)) {}
  FloatPack() = default;
};
struct DoublePack {
  static constexpr int lanes = 8;
  __m512d f;
  DR_FN DoublePack(__m512d f_) : f(f_) {}
  DR_FN explicit DoublePack(double s) : f(_mm512_set1_pd(s)) {}
  DoublePack() = default;
};

DR_FN WordPack wide_product(WordPack a, uint32_t b) { return _mm512_mul_epu32(a.u, _mm512_set1_epi64(b)); }
DR_FN WordPack high_word(WordPack p) { return _mm512_srli_epi64(p.u, 32); }
DR_FN WordPack low_word(WordPack p) { return p; }
DR_FN WordPack exclusive_or(WordPack a, WordPack b, uint32_t c) {
  return _mm512_ternarylogic_epi64(a.u, b.u, _mm512_set1_epi64(c), 0x96);
}
DR_FN void count_up(WordPack& w, uint32_t q) {
  w.u = _mm512_add_epi64(_mm512_set1_epi64(q), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}
DR_FN IntPack merge(WordPack a, WordPack b) {
  return _mm512_mask_shuffle_epi32(a.u, 0xAAAA, b.u, static_cast<_MM_PERM_ENUM>(0xA0));
}

DR_FN IntPack operator+(IntPack a, IntPack b) { return _mm512_add_epi32(a.u, b.u); }
DR_FN IntPack operator-(IntPack a, IntPack b) { return _mm512_sub_epi32(a.u, b.u); }
DR_FN IntPack operator&(IntPack a, IntPack b) { return _mm512_and_epi32(a.u, b.u); }
DR_FN IntPack operator|(IntPack a, IntPack b) { return _mm512_or_epi32(a.u, b.u); }
DR_FN IntPack operator^(IntPack a, IntPack b) { return _mm512_xor_epi32(a.u, b.u); }
template <int n>
DR_FN IntPack shift_left(IntPack a) {
  return _mm512_slli_epi32(a.u, n);
}
template <int n>
DR_FN IntPack shift_right(IntPack a) {
  return _mm512_srli_epi32(a.u, n);
}
template <int n>
DR_FN IntPack shift_right_signed(IntPack a) {
  return _mm512_srai_epi32(a.u, n);
}
DR_FN IntPack where_greater(IntPack a, IntPack b, IntPack yes, IntPack no) {
  return _mm512_mask_blend_epi32(_mm512_cmpgt_epi32_mask(a.u, b.u), no.u, yes.u);
}
DR_FN Twice<IntPack> interleave(IntPack a, IntPack b) {
  return Twice<IntPack>(_mm512_unpacklo_epi32(a.u, b.u), _mm512_unpackhi_epi32(a.u, b.u));
}

DR_FN FloatPack operator+(FloatPack a, FloatPack b) { return _mm512_add_ps(a.f, b.f); }
DR_FN FloatPack operator-(FloatPack a, FloatPack b) { return _mm512_sub_ps(a.f, b.f); }
DR_FN FloatPack operator*(FloatPack a, FloatPack b) { return _mm512_mul_ps(a.f, b.f); }
DR_FN FloatPack operator-(FloatPack a) { return _mm512_xor_ps(a.f, _mm512_set1_ps(-0.0f)); }
DR_FN FloatPack square_root(FloatPack a) { return _mm512_sqrt_ps(a.f); }
DR_FN FloatPack from_bits(IntPack a) { return _mm512_castsi512_ps(a.u); }
DR_FN IntPack bits(FloatPack a) { return _mm512_castps_si512(a.f); }
DR_FN FloatPack from_unsigned(IntPack a) { return _mm512_cvtepu32_ps(a.u); }
DR_FN FloatPack from_signed(IntPack a) { return _mm512_cvtepi32_ps(a.u); }
DR_FN FloatPack choose(IntPack flag, FloatPack set, FloatPack clear) {
  return _mm512_mask_blend_ps(_mm512_movepi32_mask(flag.u), clear.f, set.f);
}
DR_FN FloatPack flip_sign(FloatPack a, IntPack flag) {
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(a.f), flag.u, _mm512_set1_epi32(INT32_MIN), 0x78));  // a ^ (flag & sign)
}
DR_FN Twice<FloatPack> interleave(FloatPack a, FloatPack b) {
  return Twice<FloatPack>(_mm512_unpacklo_ps(a.f, b.f), _mm512_unpackhi_ps(a.f, b.f));
}

DR_FN DoublePack operator+(DoublePack a, DoublePack b) { return _mm512_add_pd(a.f, b.f); }
DR_FN DoublePack operator-(DoublePack a, DoublePack b) { return _mm512_sub_pd(a.f, b.f); }
DR_FN DoublePack operator*(DoublePack a, DoublePack b) { return _mm512_mul_pd(a.f, b.f); }
DR_FN DoublePack operator-(DoublePack a) { return _mm512_xor_pd(a.f, _mm512_set1_pd(-0.0)); }
DR_FN Twice<DoublePack> widen(FloatPack a) {
  return Twice<DoublePack>(_mm512_cvtps_pd(_mm512_castps512_ps256(a.f)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.f, 1)));
}

DR_FN void read(FloatPack& a, const float* p) { a.f = _mm512_loadu_ps(p); }
DR_FN void read(DoublePack& a, const double* p) { a.f = _mm512_loadu_pd(p); }
DR_FN void read(FloatPack& a, const BFloat16* p) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a.f = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
DR_FN void read(FloatPack& a, const Float16* p) {
  a.f = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// What is written has been rounded to the storage type before.
DR_FN void write(float* p, FloatPack a) { _mm512_storeu_ps(p, a.f); }
DR_FN void write(double* p, DoublePack a) { _mm512_storeu_pd(p, a.f); }
DR_FN void write(BFloat16* p, FloatPack a) {
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(a.f), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
}
DR_FN void write(Float16* p, FloatPack a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
DR_FN FloatPack stored_as(FloatPack a, const float*) { return a; }
DR_FN DoublePack stored_as(DoublePack a, const double*) { return a; }
DR_FN FloatPack stored_as(FloatPack a, const Float16*) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(a.f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

using BigWord = Twice<Twice<WordPack>>;  // four Philox chains: measured beside two and eight in docs/performance.md
using SmallWord = WordPack;
template <class T>
using Part = Twice<std::conditional_t<std::is_same_v<T, double>, DoublePack, FloatPack>>;

}  // namespace
}  // namespace deeprelax::cpu

#include "lifted_memory.h"
#include "step.h"

namespace deeprelax::cpu {
const Kernels kAvx512 = kernels_of("avx512");
}
