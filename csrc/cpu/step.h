// The CPU kernels, written once over the lane types of an instruction set and compiled once for each.
//
// An element belongs to counter q = (global index) / 4. A block is as many elements as a bundle of counters makes normals for,
// starting at a whole counter; all arithmetic happens in whole blocks. Ragged heads and tails go through a block-sized buffer,
// so that one odd element never sends a tensor down another path.
//
// The including file defines, in an anonymous namespace of deeprelax::cpu, the packs of its instruction set and
//   BigWord, SmallWord       the bundles of counters a block is made of, in a tensor's body and at its ends
//   Part<float>, Part<double>  the lane types of the update: a few packs, so that a part's roles fit the registers together
#pragma once

#include <type_traits>

#include "../core/clock.h"
#include "../core/gaussian.h"
#include "../core/rounding.h"
#include "../table.h"
#include "kernels.h"

namespace deeprelax::cpu {
namespace {

template <class Word>
constexpr int64_t kBlock = 4 * Lanes<Word>::count;  // elements

// Where the randomness of a call comes from: the parts of the counter that stay put while q counts up.
struct Noise {
  Key key;
  uint32_t step, number;
  bool normals, words;  // which of the two a call needs
};

template <class Stored>
struct Pointers {
  using T = typename ComputeType<Stored>::type;
  Stored* y;
  const Stored* g;
  T *x, *m, *v, *w;
  const T* c;
  T* master;

  template <class P>
  static P* shift(P* p, int64_t n) {
    return p ? p + n : nullptr;
  }

  static Pointers of(const Tensor& t, const void* g) {
    return {static_cast<Stored*>(t.y), static_cast<const Stored*>(g), static_cast<T*>(t.x),       static_cast<T*>(t.m),
            static_cast<T*>(t.v),      static_cast<T*>(t.w),          static_cast<const T*>(t.c), static_cast<T*>(t.master)};
  }

  Pointers operator+(int64_t n) const {
    return {shift(y, n), shift(g, n), shift(x, n), shift(m, n), shift(v, n), shift(w, n), shift(c, n), shift(master, n)};
  }
};

// Not std::min and std::copy_n: a template of the standard library that one instruction set's file fails to inline would be
// shared with the others by the linker.
DR_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
DR_FN void copy(T* to, const T* from, int64_t n) {
  constexpr int64_t piece = 16 / sizeof(T);
  int64_t i = 0;
  for (; i + piece <= n; i += piece) __builtin_memcpy(to + i, from + i, 16);
  for (; i < n; ++i) to[i] = from[i];
}

// ---- One block -------------------------------------------------------------------------------------------------------------

// Stands for the rounding words where a storage type needs none.
struct NoWords {};
DR_FN NoWords lower(NoWords) { return {}; }
DR_FN NoWords upper(NoWords) { return {}; }
template <class L>
DR_FN L lower(const Twice<L>& both) {
  return both.lo;
}
template <class L>
DR_FN L upper(const Twice<L>& both) {
  return both.hi;
}

// Cuts a block's normals and rounding words into parts.
template <class V, class Z, class U, class Visit>
DR_FN void visit_parts(const Z& z, const U& words, int64_t at, const Visit& visit) {
  if constexpr (std::is_same_v<Z, V>) {
    visit(z, words, at);
  } else {
    visit_parts<V>(z.lo, lower(words), at, visit);
    visit_parts<V>(z.hi, upper(words), at + Lanes<Z>::count / 2, visit);
  }
}

template <class Word, class Stored>
DR_FN void take_block(const Scalars<typename ComputeType<Stored>::type>& h, const Pointers<Stored>& at, const Noise& noise,
                      uint32_t q, uint32_t q_high) {
  using T = typename ComputeType<Stored>::type;
  using V = Part<T>;
  auto draw = [&](uint32_t stream) DR_INLINE_LAMBDA { return philox4x32<Word>(noise.key, q, q_high, noise.step, stream); };
  auto z = [&] {
    decltype(normals(draw(0))) normal(0.0f);
    if (noise.normals) normal = normals(draw(noise.number));
    if constexpr (std::is_same_v<T, double>) {
      return widen(normal);
    } else {
      return normal;
    }
  }();
  auto words = [&] {
    if constexpr (std::is_same_v<Stored, BFloat16>) {
      decltype(words_in_order(draw(0))) random(0u);
      if (noise.words) random = words_in_order(draw(noise.number | kDomainRounding));
      return random;
    } else {
      return NoWords{};
    }
  }();

  visit_parts<V>(z, words, 0, [&](const V& normal, const auto& random, int64_t i) DR_INLINE_LAMBDA {
    const Pointers<Stored> p = at + i;
    Element<V> t;
    if (h.reads_y()) {
      if (p.master) {
        read(t.y, p.master);
      } else {
        read(t.y, p.y);
      }
    }
    if (h.inner) read(t.g, p.g);
    if (h.reads_x()) read(t.x, p.x);
    if (h.reads_m()) read(t.m, p.m);
    if (h.has_v()) read(t.v, p.v);
    if (h.has_w()) read(t.w, p.w);
    if (h.reads_c()) read(t.c, p.c);

    take_step(h, t, normal, [&](V y) DR_INLINE_LAMBDA {
      if (p.master) return y;
      if constexpr (std::is_same_v<Stored, BFloat16>) {
        if (noise.words) return from_bits(stochastic_bfloat16(bits(y), random));
      }
      return stored_as(y, p.y);
    });

    if (p.master) {
      write(p.master, t.y);
      t.y = stored_as(t.y, p.y);
    }
    write(p.y, t.y);
    if (h.outer) write(p.x, t.x);
    if (h.writes_m()) write(p.m, t.m);
    if (h.has_v()) write(p.v, t.v);
    if (h.has_w()) write(p.w, t.w);
  });
}

// ---- Many blocks -----------------------------------------------------------------------------------------------------------

// How far ahead of its use a block is asked for, in blocks; docs/performance.md has what others cost.
constexpr int64_t kAhead = 2;

// Asks for the cache lines of n elements of each role that a call reads.
template <int64_t n, class Stored>
DR_FN void prefetch(const Scalars<typename ComputeType<Stored>::type>& h, const Pointers<Stored>& at) {
  auto lines = [](const auto* role) DR_INLINE_LAMBDA {
    constexpr int64_t line = 64 / sizeof(*role);
    if (!role) return;
    for (int64_t i = 0; i < n; i += line) __builtin_prefetch(role + i);
  };
  if (at.master) {
    lines(at.master);
  } else if (h.reads_y()) {
    lines(at.y);
  }
  if (h.inner) lines(at.g);
  if (h.reads_x()) lines(at.x);
  if (h.reads_m()) lines(at.m);
  if (h.has_v()) lines(at.v);
  if (h.has_w()) lines(at.w);
  if (h.reads_c()) lines(at.c);
}

template <class Word, class Stored>
__attribute__((noinline)) void take_blocks(const Scalars<typename ComputeType<Stored>::type>& scalars,
                                           const Pointers<Stored>& start, const Noise& source, uint32_t q, uint32_t q_high,
                                           int64_t count) {
  const auto h = scalars;  // copies that no store can alias
  const Noise noise = source;
  auto at = start;
  for (int64_t block = 0; block < count; ++block) {
    // While a block's noise is computed the memory works for a later one. The hardware's prefetchers stop at every page.
    if (block + kAhead < count) prefetch<kBlock<Word>>(h, at + kAhead * kBlock<Word>);
    take_block<Word>(h, at, noise, q, q_high);
    at = at + kBlock<Word>;
    q += Lanes<Word>::count;
  }
}

// n elements, the first of them lane `lane` of counter q, all within one block: lane + n <= kBlock.
template <class Word, class Stored>
__attribute__((noinline)) void take_ragged(const Scalars<typename ComputeType<Stored>::type>& h, const Pointers<Stored>& at,
                                           const Noise& noise, uint32_t q, uint32_t q_high, int lane, int64_t n) {
  using T = typename ComputeType<Stored>::type;
  constexpr int64_t size = kBlock<Word>;
  Stored y[size], g[size];
  T x[size], m[size], v[size], w[size], c[size], master[size];
  auto in = [&](auto* buffer, const auto* from) {
    if (!from) return;
    for (int64_t i = 0; i < size; ++i) buffer[i] = {};  // what is left over from before may be slow to compute with
    copy(buffer + lane, from, n);
  };
  auto out = [&](const auto* buffer, auto* to) {
    if (to) copy(to, buffer + lane, n);
  };
  in(y, at.y), in(g, at.g), in(x, at.x), in(m, at.m), in(v, at.v), in(w, at.w), in(c, at.c), in(master, at.master);
  take_blocks<Word, Stored>(h, {y, g, x, m, v, w, c, at.master ? master : nullptr}, noise, q, q_high, 1);
  out(y, at.y), out(master, at.master);
  if (h.outer) out(x, at.x);
  if (h.writes_m()) out(m, at.m);
  if (h.has_v()) out(v, at.v);
  if (h.has_w()) out(w, at.w);
}

// Walks n elements from global index i on in whole blocks and ragged ends: blocks(word, done, q, q_high, count) and
// ragged(done, q, q_high, lane, n). A stretch ends where the upper half of the counter changes.
template <class Blocks, class Ragged>
void walk(int64_t i, int64_t n, const Blocks& blocks, const Ragged& ragged) {
  for (int64_t done = 0, took; done < n; done += took, i += took) {
    const int lane = static_cast<int>(i & 3);
    const uint32_t q = static_cast<uint32_t>(i >> 2), q_high = static_cast<uint32_t>(i >> 34);
    const int64_t fit = least(n - done, ((int64_t(1) << 32) - q) * 4 - lane);
    if (lane == 0 && fit >= kBlock<BigWord>) {
      took = fit / kBlock<BigWord> * kBlock<BigWord>;
      blocks(BigWord(0u), done, q, q_high, took / kBlock<BigWord>);
    } else if (lane == 0 && fit >= kBlock<SmallWord>) {
      took = fit / kBlock<SmallWord> * kBlock<SmallWord>;
      blocks(SmallWord(0u), done, q, q_high, took / kBlock<SmallWord>);
    } else {
      took = least(fit, kBlock<SmallWord> - lane);
      ragged(done, q, q_high, lane, took);
    }
  }
}

template <class Stored>
void take_range(const Scalars<typename ComputeType<Stored>::type>& h, const Noise& noise, const Pointers<Stored>& all,
                const Place& place, int64_t begin, int64_t end) {
  const bool placed = noise.normals || noise.words;  // without noise all places are alike
  for (int64_t j = begin, n; j < end; j += n) {
    n = placed ? least(end - j, place.run - j % place.run) : end - j;
    const int64_t i = placed ? place.offset + j / place.run * place.pitch + j % place.run : 0;
    const auto at = all + j;
    walk(
        i, n,
        [&](auto word, int64_t done, uint32_t q, uint32_t q_high, int64_t count) {
          take_blocks<decltype(word)>(h, at + done, noise, q, q_high, count);
        },
        [&](int64_t done, uint32_t q, uint32_t q_high, int lane, int64_t part) {
          take_ragged<SmallWord>(h, at + done, noise, q, q_high, lane, part);
        });
  }
}

template <class Stored>
void take_share(const Work& work, int share, int shares) {
  using T = typename ComputeType<Stored>::type;
  const Numbers<T>& now = *static_cast<const Numbers<T>*>(work.numbers);
  Scalars<T> h = now.scalars;
  if (work.step.inv_scale) h.inv_scale = *static_cast<const T*>(work.step.inv_scale);
  const bool stochastic = std::is_same_v<Stored, BFloat16> && work.step.rounding == Rounding::stochastic;
  Noise noise{Key(work.step.seed), now.step, 0, h.noisy(), stochastic};
  auto gradient = [&](int64_t t) { return work.grads ? work.grads[t] : work.tensors[t].g; };
  visit_share(work.tensors, work.count, work.cost, share, shares, [&](int64_t t, int64_t begin, int64_t end) {
    // The heads of tensors to come: small tensors lie all over memory, where no hardware expects them.
    if (const int64_t ahead = t + 4; ahead < work.count) {
      const Tensor& next = work.tensors[ahead];
      const void* const roles[] = {next.y, gradient(ahead), next.x, next.m, next.v};
      for (const void* role : roles) {
        __builtin_prefetch(role);
      }
    }
    const Tensor& tensor = work.tensors[t];
    noise.number = tensor.number;
    take_range<Stored>(h, noise, Pointers<Stored>::of(tensor, gradient(t)), tensor.place, begin, end);
  });
}

inline void fill_gaussian(float* out, int64_t numel, uint64_t seed, uint32_t step, uint32_t stream, int64_t offset) {
  const Key key(seed);
  walk(
      offset, numel,
      [&](auto word, int64_t done, uint32_t q, uint32_t q_high, int64_t count) {
        using Word = decltype(word);
        float* to = out + done;
        for (int64_t block = 0; block < count; ++block, to += kBlock<Word>, q += Lanes<Word>::count) {
          write(to, normals(philox4x32<Word>(key, q, q_high, step, stream)));
        }
      },
      [&](int64_t done, uint32_t q, uint32_t q_high, int lane, int64_t n) {
        float buffer[kBlock<SmallWord>];
        write(buffer, normals(philox4x32<SmallWord>(key, q, q_high, step, stream)));
        copy(out + done, buffer + lane, n);
      });
}

constexpr Kernels kernels_of(const char* name) {
  return {name, {take_share<float>, take_share<double>, take_share<BFloat16>, take_share<Float16>}, fill_gaussian};
}

}  // namespace
}  // namespace deeprelax::cpu
