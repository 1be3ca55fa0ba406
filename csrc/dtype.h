// The storage types, and the only switch from a dtype code at run time to a storage type.
#pragma once

#include <cstdint>

// Marks functions that are compiled for the host and for CUDA.
#ifdef __CUDACC__
#define BNKERN_HD __host__ __device__ __forceinline__
#else
// These functions are always inlined. Otherwise the linker could use a copy that was compiled for one instruction set
// in the code of another.
#define BNKERN_HD __attribute__((always_inline)) inline
#endif

namespace bnkern {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// The type of sums and saved statistics.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// Calls f with a null pointer to the storage type: with_dtype(d, [&](auto* t) { using T = ...; }).
template <class F>
__attribute__((always_inline)) inline void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case DType::kFloat64:
      return f(static_cast<double*>(nullptr));
  }
}

}  // namespace bnkern
