// A block of the pool as a tensor in DLPack's exchange format (version 0.8 of its ABI), the one way to hand
// torch memory of our own without torch's headers.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/pool.h"

namespace bnkern::dlpack {

struct Device {
  std::int32_t type, id;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

constexpr std::int32_t kCpu = 1;
constexpr std::uint8_t kUInt = 1, kFloat = 2, kBFloat = 4;

// What a tensor keeps alive: its sizes and its block.
struct Owner {
  Managed managed;
  std::vector<std::int64_t> shape, strides;
  PoolBlock block;
};

// An uninitialised tensor in a block of the pool, which the deleter gives back.
inline Managed* pooled(DataType dtype, std::vector<std::int64_t> shape, std::vector<std::int64_t> strides) {
  std::int64_t elements = 1;
  for (const std::int64_t size : shape) elements *= size;
  auto* const owner = new Owner{{}, std::move(shape), std::move(strides), {}};
  owner->block = pool_take(static_cast<std::size_t>(elements) * dtype.bits / 8);
  owner->managed.tensor = {
      owner->block.data,     {kCpu, 0}, static_cast<std::int32_t>(owner->shape.size()), dtype, owner->shape.data(),
      owner->strides.data(), 0};
  owner->managed.context = owner;
  owner->managed.deleter = [](Managed* managed) {
    auto* const owner = static_cast<Owner*>(managed->context);
    pool_give(owner->block);
    delete owner;
  };
  return &owner->managed;
}

}  // namespace bnkern::dlpack
