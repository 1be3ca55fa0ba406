// The required part of DLPack's ABI (version 1): the description of a tensor, the structure by which torch takes over
// memory as a tensor, and the table of C functions that read and make torch's tensors. No header of torch or DLPack is
// needed, because the ABI is stable within a major version.
#pragma once

#include <cstdint>

namespace bnkern::dlpack {

struct Version {
  std::uint32_t major, minor;
};
struct Device {
  std::int32_t type, id;
  bool operator==(const Device&) const = default;
};
struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
  bool operator==(const DataType&) const = default;
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
  Version version;
  void* context;
  void (*deleter)(Managed*);
  std::uint64_t flags;
  Tensor tensor;
};
// The table in torch.Tensor.__dlpack_c_exchange_api__ (a capsule) or __c_dlpack_exchange_api__ (an address). Functions
// return 0, or -1 with a Python error set.
struct ExchangeApi {
  Version version;
  void* previous;
  void* allocator;
  void* managed_from_object;
  int (*object_from_managed)(Managed*, void** object);  // takes ownership of the tensor
  int (*view_of_object)(void* object, Tensor*);         // valid as long as the object; may be null
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** stream);  // may be null
};

constexpr Version kVersion{1, 0};
constexpr const char* kCapsule = "dltensor_versioned";
#ifdef BNKERN_CUDA_ON_CPU  // tests/backends/cuda_on_cpu: tensors on the CPU go to the CUDA kernels
constexpr std::int32_t kCpu = -1, kCuda = 1;
#else
constexpr std::int32_t kCpu = 1, kCuda = 2;
#endif
constexpr std::uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4;
constexpr DataType kFloat32{kFloat, 32, 1}, kFloat64{kFloat, 64, 1}, kUInt8{kUInt, 8, 1}, kInt64{kInt, 64, 1},
    kInt32{kInt, 32, 1};
// In the order of the codes of dtype.h, followed by the types of masks, counters and counts. It is the same order as in
// DTYPES of bnkern/backends/native.py.
constexpr DataType kTypes[] = {kFloat32, {kBFloat, 16, 1}, {kFloat, 16, 1}, kFloat64, kUInt8, kInt64, kInt32};

// Makes an uninitialised tensor on the CPU, aligned to 64 bytes. The memory of a large tensor comes from the pool, and
// the deleter returns it there. Throws std::bad_alloc.
Managed* empty(DataType dtype, std::int32_t ndim, const std::int64_t* shape, const std::int64_t* strides);

}  // namespace bnkern::dlpack
