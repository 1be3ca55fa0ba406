// The thread's current CUDA device, without a header of CUDA.
#pragma once

namespace bnkern {

// Makes a device the thread's current one for as long as this lives. Errors are those of the calls that follow.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = -1;  // the device to return to, where it is another
};

}  // namespace bnkern
