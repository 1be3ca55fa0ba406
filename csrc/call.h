// The two calls of batch norm, straight from torch's tensors.
#pragma once

struct _object;  // Python's PyObject

namespace bnkern {

// Adds `exchange`, `usual`, `forward` and `backward` to the module. Sets a Python error where it fails.
bool add_calls(_object* module);

}  // namespace bnkern
