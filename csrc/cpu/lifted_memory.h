// Reading and writing of bundles: the two halves of a Twice lie one behind the other. Included behind the packs' own.
#pragma once

#include "../core/lanes.h"

namespace deeprelax::cpu {
namespace {

template <class L, class Stored>
DR_FN void read(Twice<L>& lanes, const Stored* p) {
  read(lanes.lo, p);
  read(lanes.hi, p + Lanes<L>::count);
}

template <class L, class Stored>
DR_FN void write(Stored* p, const Twice<L>& lanes) {
  write(p, lanes.lo);
  write(p + Lanes<L>::count, lanes.hi);
}

}  // namespace
}  // namespace deeprelax::cpu
