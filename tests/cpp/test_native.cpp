// What the Python tests cannot reach: the core headers themselves, and the public header as another program uses it.
#include <cstdio>
#include <cstring>
#include <vector>

#include "core/gaussian.h"
#include "core/rounding.h"
#include "deeprelax/deeprelax.h"

using namespace deeprelax;

static int failures = 0;

static void check(bool ok, const char* what) {
  std::printf("%s %s\n", ok ? "ok    " : "FAILED", what);
  if (!ok) ++failures;
}

// Random123's known answers whose counters fit the layout (q, q_high, step, stream).
static void test_philox() {
  const auto words = [](uint64_t seed, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return philox4x32<uint32_t>(Key(seed), a, b, c, d);
  };
  auto w = words(0, 0, 0, 0, 0);
  check(w.w0 == 0x6627e8d5u && w.w1 == 0xe169c58du && w.w2 == 0xbc57ac4cu && w.w3 == 0x9b00dbd8u, "philox of zeros");
  w = words(~uint64_t(0), ~0u, ~0u, ~0u, ~0u);
  check(w.w0 == 0x408f276du && w.w1 == 0x41c83b0eu && w.w2 == 0xa20bc7c6u && w.w3 == 0x6d5451fdu, "philox of ones");
  w = words(0x299f31d0a4093822u, 0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u);
  check(w.w0 == 0xd16cfe09u && w.w1 == 0x94fdccebu && w.w2 == 0x5001e420u && w.w3 == 0x24126ea1u, "philox of pi");
}

static void test_float16() {
  bool widened = true, narrowed = true;
  for (uint32_t u = 0; u < 0x10000u; ++u) {
    const Float16 h{static_cast<uint16_t>(u)};
    const bool nan = (u & 0x7FFFu) > 0x7C00u;
    const uint32_t magnitude = u & 0x7FFFu;
    const float exact = magnitude < 0x400u ? magnitude * 0x1p-24f
                                           : from_bits((magnitude + (112u << 10)) << 13);  // zero and subnormals, normals
    if (magnitude < 0x7C00u) widened &= widen(h) == (u & 0x8000u ? -exact : exact);
    narrowed &= nan ? (nearest_float16(widen(h)).u & 0x7FFFu) > 0x7C00u : nearest_float16(widen(h)).u == u;
  }
  check(widened, "float16 widens exactly");
  check(narrowed, "float16 survives the round trip");
  check(nearest_float16(65519.99f).u == 0x7BFFu && nearest_float16(65520.0f).u == 0x7C00u, "float16 overflows at 65520");
  check(nearest_float16(0x1p-25f).u == 0u && nearest_float16(0x1.000002p-25f).u == 1u, "float16 underflows to even");
}

// Every instruction set, thread count and split of a call gives the bits of the portable lanes in one piece.
static void test_instruction_sets() {
  const int64_t n = 70001, offset = (int64_t(1) << 34) - 1000;  // passes the upper half of the counter
  auto run = [&](const char* name, int threads, std::vector<float>& y) {
    if (!cpu::use_instruction_set(name)) return false;
    std::vector<float> g(n), x(n), m(n, 0.25f);
    y.resize(n);
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] = 0.001f * float(i % 1013), g[i] = 0.5f - 0.002f * float(i % 499);
    Tensor t{y.data(), g.data(), x.data(), m.data(), nullptr, nullptr, nullptr, nullptr, n, 7, {offset, n, n}};
    Step h;
    h.eta = 0.1f, h.k = 0.01f, h.s = 0.03f, h.a = 0.25f, h.seed = 0x123456789abcdefu, h.step = 3;
    cpu::step(Dtype::float32, &t, 1, h, threads);
    y.insert(y.end(), m.begin(), m.end());
    return true;
  };
  std::vector<float> reference, other;
  check(run("portable", 1, reference), "portable runs");
  for (const char* name : {"portable", "avx2", "avx512"}) {
    for (int threads : {1, 2, 3}) {
      if (!run(name, threads, other)) continue;
      check(std::memcmp(other.data(), reference.data(), reference.size() * sizeof(float)) == 0, name);
    }
  }
}

int main() {
  test_philox();
  test_float16();
  test_instruction_sets();
  return failures != 0;
}
