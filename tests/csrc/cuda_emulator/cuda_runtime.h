// Enough of CUDA to run the project's plain kernels on the CPU, for tests: this folder comes before CUDA's
// own headers.
//
// A thread of a block is a fiber. Between two __syncthreads the warps run one after the other, each as far as
// it gets, in ascending order in one block and in descending order in the next, so that a barrier that is
// missing is seen in the result; within a warp, shuffles are barriers. Refused: a warp of which some threads
// wait at a shuffle or barrier and others do not, and a load that is not aligned.
//
// Not here: device memory, streams, atomics, anything asynchronous, the rounding of fast mathematics.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

#define CUDART_VERSION 13000

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

enum class State { ready, at_shuffle, at_barrier, done };

struct Fiber {
    ucontext_t context;
    dim3 thread;
    State state;
    float offered;
};

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kStackBytes = 64 * 1024;

inline std::vector<Fiber> fibers(kMaxThreads);
inline std::vector<char> stacks(kMaxThreads* kStackBytes);
inline ucontext_t scheduler;
inline unsigned current = 0;
inline bool descending = false;
inline bool misaligned = false;
// makecontext passes no pointer; one kernel runs at a time.
inline void (*run_kernel)(const void*) = nullptr;
inline const void* kernel_call = nullptr;

inline void wait_in(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void start_fiber() {
    run_kernel(kernel_call);
    wait_in(State::done);
}

// Runs a warp until all its threads wait at the block's barrier or are done.
inline void run_warp(unsigned first, unsigned end) {
    do {
        for (current = first; current < end; ++current) {
            if (fibers[current].state == State::done) continue;
            threadIdx = fibers[current].thread;
            swapcontext(&scheduler, &fibers[current].context);
        }
        for (unsigned lane = first; lane < end; ++lane)
            if (fibers[lane].state != fibers[first].state)
                throw std::logic_error("cuda_emulator: a warp is divided at a barrier");
    } while (fibers[first].state == State::at_shuffle);
}

inline void run_block() {
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
        fiber.state = State::ready;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + i * kStackBytes;
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start_fiber, 0);
    }
    descending = !descending;
    const unsigned warps = (threads + kWarp - 1) / kWarp;
    for (unsigned running = warps; running > 0;) {
        running = 0;
        for (unsigned turn = 0; turn < warps; ++turn) {
            const unsigned first = (descending ? warps - 1 - turn : turn) * kWarp;
            if (fibers[first].state == State::done) continue;
            run_warp(first, first + kWarp < threads ? first + kWarp : threads);
            if (fibers[first].state == State::at_barrier) ++running;
        }
    }
}

}  // namespace cuda_emulator

inline void __syncthreads() {
    cuda_emulator::wait_in(cuda_emulator::State::at_barrier);
}

inline float __shfl_xor_sync(unsigned, float value, int offset) {
    using namespace cuda_emulator;
    const unsigned here = current;
    fibers[here].offered = value;
    wait_in(State::at_shuffle);
    const float other = fibers[here ^ static_cast<unsigned>(offset)].offered;
    wait_in(State::at_shuffle);
    return other;
}

template <class T>
T __ldg(const T* from) {
    if (reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0) cuda_emulator::misaligned = true;
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorMisalignedAddress = 716 };
inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration"
                                                  : "cudaErrorMisalignedAddress";
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "misaligned address";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    return *device = 0, cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    return *version = CUDART_VERSION, cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > cuda_emulator::kMaxThreads || uint64_t(grid.x) * grid.y * grid.z == 0 ||
        grid.y > 65535)
        return cudaErrorInvalidConfiguration;
    const struct Call {
        void (*kernel)(Params);
        const Params* params;
    } call{kernel, static_cast<const Params*>(arguments[0])};
    cuda_emulator::kernel_call = &call;
    cuda_emulator::run_kernel = [](const void* opaque) {
        const Call& call = *static_cast<const Call*>(opaque);
        call.kernel(*call.params);
    };
    gridDim = grid;
    blockDim = block;
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) cuda_emulator::run_block();
    if (!cuda_emulator::misaligned) return cudaSuccess;
    cuda_emulator::misaligned = false;
    return cudaErrorMisalignedAddress;
}
