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
    DeviceGuard(int64_t device, const What& what) : device_(static_cast<int>(device)) {
        check(cudaGetDevice(&former_), what);
        // Also where it is that already: a thread whose first call this is has no context yet (CUDA 12 on:
        // cudaSetDevice gives it one), and a tensor map is made in one.
        check(cudaSetDevice(device_), what);
    }
    ~DeviceGuard() {
        if (former_ != device_) cudaSetDevice(former_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    const int device_;
    int former_ = 0;
};

// Lets a kernel have so many bytes of dynamic shared memory.
template <class Params>
cudaError_t allow_shared(void (*kernel)(Params), size_t bytes) {
    // More than this a kernel must ask for.
    constexpr size_t kFree = 48 * 1024;
    if (bytes <= kFree) return cudaSuccess;
    return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// kernel<<<grid, block, shared, stream>>>(params) on the current device. shared: bytes of dynamic shared
// memory.
template <class Params, class What>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, int64_t stream, Params params, const What& what,
            size_t shared = 0) {
    check(allow_shared(kernel, shared), what);
    void* arguments[] = {&params};
    check(cudaLaunchKernel(kernel, grid, block, arguments, shared, reinterpret_cast<cudaStream_t>(stream)),
          what);
}

// The same in clusters of `size` neighbouring blocks; grid: a multiple of it in x. False, and nothing is
// launched, where the GPU has no clusters, or no room for one like that.
template <class Params, class What>
bool launch_clusters(void (*kernel)(Params), dim3 grid, dim3 block, unsigned size, int64_t stream,
                     Params params, const What& what, size_t shared) {
    // Larger ones a kernel must ask for.
    constexpr unsigned kPortable = 8;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    int clusters = 0;
    cudaError_t status = allow_shared(kernel, shared);
    if (status == cudaSuccess && size > kPortable)
        status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                      cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (status != cudaSuccess || clusters == 0) {
        cudaGetLastError();
        return false;
    }
    check(cudaLaunchKernelEx(&config, kernel, params), what);
    return true;
}

}  // namespace lmkern
