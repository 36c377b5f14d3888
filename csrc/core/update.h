// The formula, once: the three element-wise updates of the numeric contract (docs/contract.md), for every native backend.
//
// y live parameter, g gradient, x anchor, m running average (of y, or p: of the gradient), v inner momentum, w outer momentum,
// c consensus of the replicas, z standard normal. T is the compute type, V a lane type of it. Every *, +, - is one rounding; a
// term that is switched off is absent; all tests are made on the rounded scalars.
#pragma once

#include "deeprelax/deeprelax.h"
#include "lanes.h"

namespace deeprelax {

template <class T>
struct Scalars {
  Family family;
  bool inner, outer, scaled, maximize, nesterov, coupling_in_momentum, nesterov_o;
  T inv_scale, eta, k, s, a, c, wd, mu, damp1, lr, mu_o, wd_o, kr;

  Scalars() = default;
  // All but inv_scale, which lies where the tensors lie: a kernel reads it.
  DR_FN explicit Scalars(const Step& h)
      : family(h.family),
        inner(h.inner),
        outer(h.outer),
        scaled(h.inv_scale != nullptr),
        maximize(h.maximize),
        nesterov(h.nesterov),
        coupling_in_momentum(h.coupling_in_momentum),
        nesterov_o(h.nesterov_o),
        inv_scale(T(1)),
        eta(T(h.eta)),
        k(T(h.k)),
        s(T(h.s)),
        a(T(h.a)),
        c(T(h.c)),
        wd(T(h.wd)),
        mu(T(h.mu)),
        damp1(T(h.damp1)),
        lr(T(h.lr)),
        mu_o(T(h.mu_o)),
        wd_o(T(h.wd_o)),
        kr(T(h.kr)) {}

  // Which roles a call reads and writes; y is always written.
  DR_FN bool langevin() const { return family == Family::langevin; }
  DR_FN bool reads_y() const { return inner && (langevin() || wd != T(0)); }
  DR_FN bool reads_x() const { return outer || (inner && (!langevin() || k != T(0))); }
  DR_FN bool reads_m() const {  // a == 1 forgets the old average
    return outer || (inner && ((a != T(0) && a != T(1)) || (!langevin() && a == T(0) && c != T(0))));
  }
  DR_FN bool writes_m() const { return (inner && a != T(0)) || (outer && langevin()); }
  DR_FN bool has_v() const { return inner && langevin() && mu != T(0); }
  DR_FN bool has_w() const { return outer && mu_o != T(0); }
  DR_FN bool reads_c() const { return outer && kr != T(0); }
  DR_FN bool noisy() const { return s != T(0) && (inner || (outer && !langevin())); }
};

template <class V>
struct Element {
  V y, g, x, m, v, w, c;
};

template <class T, class V>
DR_FN V gradient(const Scalars<T>& h, const Element<V>& t) {
  V d = t.g;
  if (h.scaled) d = d * V(h.inv_scale);
  if (h.maximize) d = -d;
  if (h.wd != T(0)) d = d + V(h.wd) * t.y;
  return d;
}

// Family A. `rounded` gives the value that y has once it is stored.
template <class T, class V, class Round>
DR_FN void langevin_step(const Scalars<T>& h, Element<V>& t, V z, const Round& rounded) {
  V d = gradient(h, t);
  if (h.k != T(0) && h.coupling_in_momentum) d = d + V(h.k) * (t.y - t.x);
  if (h.mu != T(0)) {
    t.v = V(h.mu) * t.v + V(h.damp1) * d;
    d = h.nesterov ? d + V(h.mu) * t.v : t.v;
  }
  if (h.k != T(0) && !h.coupling_in_momentum) d = d + V(h.k) * (t.y - t.x);
  V y = t.y - V(h.eta) * d;
  if (h.s != T(0)) y = y + V(h.s) * z;
  t.y = rounded(y);
  if (h.a == T(1)) {
    t.m = t.y;
  } else if (h.a != T(0)) {
    t.m = t.m + V(h.a) * (t.y - t.m);
  }
}

// Family B; p is t.m.
template <class T, class V, class Round>
DR_FN void gradient_average_step(const Scalars<T>& h, Element<V>& t, V z, const Round& rounded) {
  V d = gradient(h, t);
  if (h.a == T(1)) {
    t.m = d;
  } else if (h.a != T(0)) {
    t.m = t.m + V(h.a) * (d - t.m);
  }
  V y = t.x;
  if (h.c != T(0)) y = y - V(h.c) * t.m;
  if (h.s != T(0)) y = y + V(h.s) * z;
  t.y = rounded(y);
}

template <class T, class V, class Round>
DR_FN void outer_step(const Scalars<T>& h, Element<V>& t, V z, const Round& rounded) {
  V d = h.langevin() ? t.x - t.m : t.m;
  if (h.wd_o != T(0)) d = d + V(h.wd_o) * t.x;
  if (h.kr != T(0)) d = d + V(h.kr) * (t.x - t.c);
  if (h.mu_o != T(0)) {
    t.w = V(h.mu_o) * t.w + d;
    d = h.nesterov_o ? d + V(h.mu_o) * t.w : t.w;
  }
  t.x = t.x - V(h.lr) * d;
  V y = t.x;
  if (h.langevin()) {
    t.m = t.x;
  } else if (h.s != T(0)) {
    y = y + V(h.s) * z;
  }
  t.y = rounded(y);
}

template <class T, class V, class Round>
DR_FN void take_step(const Scalars<T>& h, Element<V>& t, V z, const Round& rounded) {
  if (h.inner) {
    if (h.langevin()) {
      langevin_step(h, t, z, rounded);
    } else {
      gradient_average_step(h, t, z, rounded);
    }
  }
  if (h.outer) outer_step(h, t, z, rounded);
}

}  // namespace deeprelax
