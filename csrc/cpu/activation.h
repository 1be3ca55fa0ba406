// Where and how an activation changes values. Forward and backward ask the packed value z, which is the one that is
// stored or would be, so that they cannot disagree.
#pragma once

#include "../params.h"
#include "storage.h"

namespace bnkern::BNKERN_ISA {

// z, or a gradient at z, after an activation; `positive`: not (z <= 0). Lanes: Vec or Packed.
template <class Lanes, class Mask>
BNKERN_INLINE Lanes activate(Activation act, Lanes lanes, Mask positive) {
  switch (act) {
    case Activation::relu:
      return lanes.keep(positive);
    case Activation::none:
      break;
  }
  __builtin_unreachable();  // the caller has tested for none
}

}  // namespace bnkern::BNKERN_ISA
