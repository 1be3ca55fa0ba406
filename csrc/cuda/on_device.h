// Sets the thread's current CUDA device, without a header of CUDA.
#pragma once

namespace bnkern {

// Makes a device the thread's current device while the object exists. If this fails, the following calls report it.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = -1;  // the previous device, if it is another one
};

}  // namespace bnkern
