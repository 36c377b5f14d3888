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

// Overwrites what a law says of gamma and lr. In binary64 up to the one rounding to the compute type.
template <class T>
DR_FN void follow(const Law& law, double gamma, double lr, Scalars<T>& h) {
  auto deviation = [&](double per_degree) {
    return T(law.temperature != 0.0 ? square_root(per_degree * law.temperature) : 0.0);
  };
  if (law.lr == Rate::inner) {
    h.eta = T(lr);
    h.s = deviation(2.0 * lr);
  } else {
    h.lr = T(lr);
  }
  if (law.gamma == Gamma::stiffness) {
    h.k = T(1.0 / (gamma != 0.0 ? gamma : 0.0));  // -0 is 0
  } else if (law.gamma == Gamma::drift) {
    h.c = T(gamma);
  } else {
    h.s = deviation(gamma);
  }
}

// a for the sample of number `count` in the average of its period; one before the first has no weight in a mean.
template <class T>
DR_FN T weight(const Law& law, int64_t count, T constant) {
  if (law.average == Average::restart) return count == 1 ? T(1) : constant;
  return count > 0 ? T(1.0 / static_cast<double>(count)) : T(0);
}

// The numbers of the coming step: those of `constant` with what the clock has to say. The clock counts the step.
template <class T>
DR_FN Numbers<T> advance(const Clock& clock, const Step& constant) {
  Numbers<T> now{Scalars<T>(constant), static_cast<uint32_t>(*clock.step)};
  Scalars<T>& h = now.scalars;
  const bool ends = clock.inner_steps > 0 && *clock.position + 1 >= clock.inner_steps;
  h.outer = ends;
  const double lr = clock.lr_is_float ? static_cast<double>(*static_cast<const float*>(clock.lr))  //
                                      : *static_cast<const double*>(clock.lr);
  follow(clock.law, *clock.gamma, lr, h);
  if (clock.period_steps) {
    const int64_t count = *clock.period_steps + (h.inner ? 1 : 0);
    h.outer = ends && (h.langevin() || count > 0);
    if (h.inner) h.a = weight(clock.law, count, h.a);
    *clock.period_steps = ends && count > 0 ? 0 : count;
  }
  if (clock.counts) {
    *clock.step += 1;
    *clock.position = ends ? 0 : *clock.position + 1;
    if (ends) {
      *clock.outer_steps += 1;
      *clock.gamma = gamma_after(clock, *clock.outer_steps, *clock.gamma);
    }
  }
  return now;
}

}  // namespace deeprelax
