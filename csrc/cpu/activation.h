// The activations. Forward and backward both test z after it was rounded to the storage type, so both compute the same
// mask.
#pragma once

#include "../params.h"
#include "storage.h"

namespace bnkern::BNKERN_ISA {

// Applies an activation to z, or to the gradient at z. `positive` is the mask of not (z <= 0). Lanes is Vec or Packed.
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
