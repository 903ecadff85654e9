// What every CUDA op does on the host: choose the device, launch, turn an error into an exception. Never
// synchronises.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lmkern {

// Multiple of 32; the most that any GPU takes.
constexpr int kMaxThreads = 1024;

// what() gives the words for an error.
template <class What>
void check(cudaError_t status, const What& what) {
    if (status == cudaSuccess) return;
    // An error of a launch is kept and would be reported again by the next call that asks.
    cudaGetLastError();
    throw std::runtime_error(what() + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

// Makes `device` the thread's current one, and the former one again at the end.
class DeviceGuard {
public:
    template <class What>
    DeviceGuard(int64_t device, const What& what) {
        check(cudaGetDevice(&former_), what);
        if (former_ == device) return;
        check(cudaSetDevice(static_cast<int>(device)), what);
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(former_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int former_ = 0;
    bool changed_ = false;
};

// kernel<<<grid, block, shared, stream>>>(params) on the current device. shared: bytes of dynamic shared
// memory.
template <class Params, class What>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, int64_t stream, Params params, const What& what,
            size_t shared = 0) {
    // More than this a kernel must ask for.
    constexpr size_t kFree = 48 * 1024;
    if (shared > kFree)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
              what);
    void* arguments[] = {&params};
    check(cudaLaunchKernel(kernel, grid, block, arguments, shared, reinterpret_cast<cudaStream_t>(stream)),
          what);
}

}  // namespace lmkern
