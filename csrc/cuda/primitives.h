// What the GPU kernels use beyond CUDA C++'s own names: shared memory sized at launch, launching, the device.
//
// python_tests/cuda_stand_in/primitives.h offers the same to the same kernels on the host, where tests run
// them; a kernel that needs another primitive needs it there too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace reformer::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// The shared memory of a block, as many bytes as its launch asked for, 16-byte aligned.
template <typename Element>
__device__ __forceinline__ Element* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<Element*>(memory);
}

template <typename Type>
struct Given {
  using type = Type;
};

// Enqueues `kernel` in `stream`; no synchronisation, so a CUDA graph can capture it.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
                   void* stream, typename Given<Parameters>::type... arguments) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
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

// Makes `device` the calling thread's until the end of the scope. This library's CUDA runtime is its own, so
// it does not rely on torch's having chosen.
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
