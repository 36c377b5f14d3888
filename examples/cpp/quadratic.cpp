// Entropy-SGD on f(y) = |y|^2 / 2 in plain C++: twenty inner steps and an outer step a period.
#include <deeprelax/deeprelax.h>

#include <cstdio>
#include <vector>

int main() {
  using namespace deeprelax;
  constexpr int64_t n = 1000;
  std::vector<float> y(n, 1.0f), g(n), x = y, m = y;
  Tensor parameter{};
  parameter.y = y.data(), parameter.g = g.data(), parameter.x = x.data(), parameter.m = m.data();
  parameter.numel = n, parameter.place = {0, n, n};

  Step h;
  h.eta = 0.1f, h.k = 0.01f, h.s = 0.01f, h.a = 0.25f, h.lr = 0.5f, h.seed = 1;
  for (uint32_t step = 0; step < 200; ++step) {
    for (int64_t i = 0; i < n; ++i) g[i] = y[i];
    h.step = step;
    h.outer = (step + 1) % 20 == 0;
    cpu::step(Dtype::float32, &parameter, 1, h, 2);
  }
  double loss = 0;
  for (float value : x) loss += 0.5 * value * value;
  std::printf("%s: loss at the anchor %.6f, from %.1f\n", cpu::instruction_set(), loss, 0.5 * n);
  return loss < 1.0 ? 0 : 1;
}
