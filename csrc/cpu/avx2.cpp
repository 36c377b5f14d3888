// The CPU kernels for AVX2 (with F16C).
#include <immintrin.h>

#include <type_traits>

#include "../core/philox.h"
#include "../core/rounding.h"

namespace deeprelax::cpu {
namespace {

// 4 counters' words, each in the low half of a 64-bit lane. Counters go 0 2 1 3, so that merge and interleave, which work
// within 128 bits, end in storage order.
struct WordPack {
  static constexpr int lanes = 4;
  __m256i u;
  DR_FN WordPack(__m256i u_) : u(u_) {}
  DR_FN explicit WordPack(uint32_t w) : u(_mm256_set1_epi64x(w)) {}
  WordPack() = default;
};
struct IntPack {
  static constexpr int lanes = 8;
  __m256i u;
  DR_FN IntPack(__m256i u_) : u(u_) {}
  DR_FN explicit IntPack(uint32_t w) : u(_mm256_set1_epi32(static_cast<int>(w))) {}
  IntPack() = default;
};
struct FloatPack {
  static constexpr int lanes = 8;
  __m256 f;
  DR_FN FloatPack(__m256 f_) : f(f_) {}
  DR_FN explicit FloatPack(float s) : f(_mm256_set1_ps(s)) {}
  FloatPack() = default;
};
struct DoublePack {
  static constexpr int lanes = 4;
  __m256d f;
  DR_FN DoublePack(__m256d f_) : f(f_) {}
  DR_FN explicit DoublePack(double s) : f(_mm256_set1_pd(s)) {}
  DoublePack() = default;
};

DR_FN WordPack wide_product(WordPack a, uint32_t b) { return _mm256_mul_epu32(a.u, _mm256_set1_epi64x(b)); }
DR_FN WordPack high_word(WordPack p) { return _mm256_srli_epi64(p.u, 32); }
DR_FN WordPack low_word(WordPack p) { return p; }
DR_FN WordPack exclusive_or(WordPack a, WordPack b, uint32_t c) {
  return _mm256_xor_si256(_mm256_xor_si256(a.u, b.u), _mm256_set1_epi64x(c));
}
DR_FN void count_up(WordPack& w, uint32_t q) { w.u = _mm256_add_epi64(_mm256_set1_epi64x(q), _mm256_set_epi64x(3, 1, 2, 0)); }
DR_FN IntPack merge(WordPack a, WordPack b) { return _mm256_blend_epi32(a.u, _mm256_slli_epi64(b.u, 32), 0xAA); }

DR_FN IntPack operator+(IntPack a, IntPack b) { return _mm256_add_epi32(a.u, b.u); }
DR_FN IntPack operator-(IntPack a, IntPack b) { return _mm256_sub_epi32(a.u, b.u); }
DR_FN IntPack operator&(IntPack a, IntPack b) { return _mm256_and_si256(a.u, b.u); }
DR_FN IntPack operator|(IntPack a, IntPack b) { return _mm256_or_si256(a.u, b.u); }
DR_FN IntPack operator^(IntPack a, IntPack b) { return _mm256_xor_si256(a.u, b.u); }
template <int n>
DR_FN IntPack shift_left(IntPack a) {
  return _mm256_slli_epi32(a.u, n);
}
template <int n>
DR_FN IntPack shift_right(IntPack a) {
  return _mm256_srli_epi32(a.u, n);
}
template <int n>
DR_FN IntPack shift_right_signed(IntPack a) {
  return _mm256_srai_epi32(a.u, n);
}
DR_FN IntPack where_greater(IntPack a, IntPack b, IntPack yes, IntPack no) {
  return _mm256_blendv_epi8(no.u, yes.u, _mm256_cmpgt_epi32(a.u, b.u));
}
DR_FN Twice<IntPack> interleave(IntPack a, IntPack b) {
  return Twice<IntPack>(_mm256_unpacklo_epi32(a.u, b.u), _mm256_unpackhi_epi32(a.u, b.u));
}

DR_FN FloatPack operator+(FloatPack a, FloatPack b) { return _mm256_add_ps(a.f, b.f); }
DR_FN FloatPack operator-(FloatPack a, FloatPack b) { return _mm256_sub_ps(a.f, b.f); }
DR_FN FloatPack operator*(FloatPack a, FloatPack b) { return _mm256_mul_ps(a.f, b.f); }
DR_FN FloatPack operator-(FloatPack a) { return _mm256_xor_ps(a.f, _mm256_set1_ps(-0.0f)); }
DR_FN FloatPack square_root(FloatPack a) { return _mm256_sqrt_ps(a.f); }
DR_FN FloatPack from_bits(IntPack a) { return _mm256_castsi256_ps(a.u); }
DR_FN IntPack bits(FloatPack a) { return _mm256_castps_si256(a.f); }
DR_FN FloatPack from_signed(IntPack a) { return _mm256_cvtepi32_ps(a.u); }
// AVX2 converts signed integers only. Both halves and the product are exact, so the sum is the one rounding.
DR_FN FloatPack from_unsigned(IntPack a) {
  const FloatPack high = from_signed(shift_right<16>(a)), low = from_signed(a & IntPack(0xFFFFu));
  return high * FloatPack(65536.0f) + low;
}
DR_FN FloatPack choose(IntPack flag, FloatPack set, FloatPack clear) {
  return _mm256_blendv_ps(clear.f, set.f, _mm256_castsi256_ps(flag.u));
}
DR_FN FloatPack flip_sign(FloatPack a, IntPack flag) {
  return _mm256_xor_ps(a.f, _mm256_and_ps(_mm256_castsi256_ps(flag.u), _mm256_set1_ps(-0.0f)));
}
DR_FN Twice<FloatPack> interleave(FloatPack a, FloatPack b) {
  return Twice<FloatPack>(_mm256_unpacklo_ps(a.f, b.f), _mm256_unpackhi_ps(a.f, b.f));
}

DR_FN DoublePack operator+(DoublePack a, DoublePack b) { return _mm256_add_pd(a.f, b.f); }
DR_FN DoublePack operator-(DoublePack a, DoublePack b) { return _mm256_sub_pd(a.f, b.f); }
DR_FN DoublePack operator*(DoublePack a, DoublePack b) { return _mm256_mul_pd(a.f, b.f); }
DR_FN DoublePack operator-(DoublePack a) { return _mm256_xor_pd(a.f, _mm256_set1_pd(-0.0)); }
DR_FN Twice<DoublePack> widen(FloatPack a) {
  return Twice<DoublePack>(_mm256_cvtps_pd(_mm256_castps256_ps128(a.f)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.f, 1)));
}

DR_FN void read(FloatPack& a, const float* p) { a.f = _mm256_loadu_ps(p); }
DR_FN void read(DoublePack& a, const double* p) { a.f = _mm256_loadu_pd(p); }
DR_FN void read(FloatPack& a, const BFloat16* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  a.f = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
DR_FN void read(FloatPack& a, const Float16* p) { a.f = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// What is written has been rounded to the storage type before.
DR_FN void write(float* p, FloatPack a) { _mm256_storeu_ps(p, a.f); }
DR_FN void write(double* p, DoublePack a) { _mm256_storeu_pd(p, a.f); }
DR_FN void write(BFloat16* p, FloatPack a) {
  const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(a.f), 16);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256(upper, 1)));
}
DR_FN void write(Float16* p, FloatPack a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
DR_FN FloatPack stored_as(FloatPack a, const float*) { return a; }
DR_FN DoublePack stored_as(DoublePack a, const double*) { return a; }
DR_FN FloatPack stored_as(FloatPack a, const Float16*) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(a.f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

using BigWord = Twice<WordPack>;  // two Philox chains: there are only 16 registers
using SmallWord = WordPack;
template <class T>
using Part = Twice<std::conditional_t<std::is_same_v<T, double>, DoublePack, FloatPack>>;

}  // namespace
}  // namespace deeprelax::cpu

#include "lifted_memory.h"
#include "step.h"

namespace deeprelax::cpu {
const Kernels kAvx2 = kernels_of("avx2");
}
