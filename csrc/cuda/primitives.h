// What GPU kernels need besides CUDA C++ itself: shared memory whose size the launch sets, launches, and the
// choice of the device.
//
// Tests run the same kernels on the host, where python_tests/ops/sort/cuda_stand_in/primitives.h takes the
// place of this file. A primitive that is added here must be added there too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace reformer::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The shared memory of a block, of the size that its launch asked for; 16-byte aligned.
template <typename Element>
__device__ __forceinline__ Element* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<Element*>(memory);
}

// Keeps a parameter out of template deduction, so that arguments convert as in an ordinary call.
template <typename Type>
struct NotDeduced {
  using type = Type;
};

// Enqueues `kernel` in `stream`. Nothing is synchronised, so a CUDA graph can capture the launch.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   void* stream, typename NotDeduced<Parameters>::type... arguments) {
  constexpr int64_t kDefaultLimit = 48 << 10;  // more shared memory must be requested for the kernel
  if (shared_bytes > kDefaultLimit) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* list[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), list, static_cast<size_t>(shared_bytes),
                          static_cast<cudaStream_t>(stream));
}

// Makes `device` the calling thread's current device until the end of the scope. This library has a CUDA
// runtime of its own, so it cannot rely on the device that torch chose.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ != cudaSuccess || before_ == device) return;
    error_ = cudaSetDevice(device);
    changed_ = error_ == cudaSuccess;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace reformer::cuda
