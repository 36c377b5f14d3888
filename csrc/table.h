// Which tensors a launch covers, and which part of them each worker takes.
#pragma once

#include <cstdint>

#include "deeprelax/deeprelax.h"

namespace deeprelax {

// Cuts inside a tensor fall on multiples of this many elements: whole blocks of every kernel, whole cache lines of every type.
constexpr int64_t kCut = 512;
// What taking up one more tensor costs, in elements: keeps the shares of many small tensors equal too.
constexpr int64_t kTensorCost = 64;

inline int64_t total_cost(const Tensor* tensors, int64_t count) {
  int64_t cost = 0;
  for (int64_t t = 0; t < count; ++t) cost += tensors[t].numel + kTensorCost;
  return cost;
}

// Calls visit(t, begin, end) for each range of elements, of tensor number t, in the share-th of `shares` near-equal parts of
// the table. The shares are disjoint and cover everything.
template <class Visit>
void visit_share(const Tensor* tensors, int64_t count, int64_t cost, int share, int shares, const Visit& visit) {
  const int64_t more = cost % shares;  // shares that are larger by one
  const int64_t first = cost / shares * share + (share < more ? share : more);
  const int64_t last = first + cost / shares + (share < more);
  int64_t start = 0;  // cost of the tensors before this one
  for (int64_t t = 0; t < count && start < last; ++t) {
    const int64_t numel = tensors[t].numel;
    auto cut = [&](int64_t at) {
      const int64_t elements = at - start;
      return elements <= 0 ? int64_t(0) : elements >= numel ? numel : elements / kCut * kCut;
    };
    const int64_t begin = cut(first), end = cut(last);
    if (begin < end) visit(t, begin, end);
    start += numel + kTensorCost;
  }
}

}  // namespace deeprelax
