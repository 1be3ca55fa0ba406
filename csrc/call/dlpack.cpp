#include "dlpack.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "../cpu/pool.h"

namespace bnkern::dlpack {
namespace {

// The least size of memory from the pool. Malloc itself keeps smaller blocks for reuse.
constexpr std::size_t kPooledBytes = 256 << 10;
constexpr std::size_t kAlignment = 64;

// A tensor keeps this alive. One piece of memory has this struct, the sizes and strides, and the elements of a small
// tensor.
struct Owner {
  Managed managed;
  PoolBlock block;  // the elements of a large tensor
};

void give_back(Managed* managed) {
  auto* const owner = reinterpret_cast<Owner*>(managed);
  if (owner->block.data) pool_give(owner->block);
  std::free(owner);
}

}  // namespace

Managed* empty(DataType dtype, std::int32_t ndim, const std::int64_t* shape, const std::int64_t* strides) {
  std::size_t bytes = dtype.bits / 8;
  for (std::int32_t axis = 0; axis < ndim; ++axis) bytes *= static_cast<std::size_t>(shape[axis]);
  const bool pooled = bytes >= kPooledBytes;
  const std::size_t head = sizeof(Owner) + 2 * static_cast<std::size_t>(ndim) * sizeof(std::int64_t);
  auto* const owner = static_cast<Owner*>(std::malloc(head + (pooled ? 0 : bytes + kAlignment)));
  if (!owner) throw std::bad_alloc();
  owner->block = {};
  void* data;
  if (pooled) {
    try {
      owner->block = pool_take(bytes);
    } catch (...) {
      std::free(owner);
      throw;
    }
    data = owner->block.data;
  } else {
    const auto end = reinterpret_cast<std::uintptr_t>(owner) + head;
    data = reinterpret_cast<void*>((end + kAlignment - 1) / kAlignment * kAlignment);
  }
  auto* const sizes = reinterpret_cast<std::int64_t*>(owner + 1);
  std::copy_n(shape, ndim, sizes);
  std::copy_n(strides, ndim, sizes + ndim);
  owner->managed = {kVersion, nullptr, give_back, 0, {data, {kCpu, 0}, ndim, dtype, sizes, sizes + ndim, 0}};
  return &owner->managed;
}

}  // namespace bnkern::dlpack
