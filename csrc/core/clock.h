// The numbers of a step worked out where the tensors lie, from counters and values that lie there too.
//
// So a step can be captured in a graph: each replay counts on, ends a period when it is time, and reads the learning rate that
// a scheduler has written meanwhile. Plain binary64 arithmetic without contraction, so the values are those that Python
// computes (deeprelax_cuda/clock.py).
#pragma once

#include "update.h"

namespace deeprelax {

// The numbers of a call in the compute type, and its noise's step.
template <class T>
struct Numbers {
  Scalars<T> scalars;
  uint32_t step;
};

// base^exponent by repeated squaring, lowest bit first; infinity where it overflows.
DR_FN double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent; exponent >>= 1) {
    if (exponent & 1) result = result * base;
    base = base * base;
  }
  return result;
}

// gamma after n outer steps.
DR_FN double gamma_after(const Clock& clock, int64_t n, double gamma) {
  auto floored = [&](double value) { return value > clock.gamma_min ? value : clock.gamma_min; };
  if (clock.gamma_total != 0.0) {
    return floored(clock.gamma_total - static_cast<double>(n) * static_cast<double>(clock.inner_steps) * clock.inner_lr);
  }
  if (clock.scoping == 0.0 || clock.initial_gamma - clock.initial_gamma != 0.0) return gamma;
  return floored(clock.initial_gamma / power(1.0 + clock.scoping, n));
}

// The numbers of the coming step: those of `constant` with what the clock has to say. The clock counts the step.
template <class T>
DR_FN Numbers<T> advance(const Clock& clock, const Step& constant) {
  Numbers<T> now{Scalars<T>(constant), static_cast<uint32_t>(*clock.step)};
  Scalars<T>& h = now.scalars;
  const bool outer = *clock.position + 1 >= clock.inner_steps;
  h.outer = outer;
  h.k = T(1.0 / *clock.gamma);
  h.lr =
      T(clock.lr_is_float ? static_cast<double>(*static_cast<const float*>(clock.lr)) : *static_cast<const double*>(clock.lr));
  if (clock.period_steps) {
    const int64_t count = *clock.period_steps + (h.inner ? 1 : 0);
    if (h.inner) h.a = T(1.0 / static_cast<double>(count));
    *clock.period_steps = outer ? 0 : count;
  }
  if (clock.counts) {
    *clock.step += 1;
    *clock.position = outer ? 0 : *clock.position + 1;
    if (outer) {
      *clock.outer_steps += 1;
      *clock.gamma = gamma_after(clock, *clock.outer_steps, *clock.gamma);
    }
  }
  return now;
}

}  // namespace deeprelax
