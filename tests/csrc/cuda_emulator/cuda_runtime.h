// Enough of CUDA to run the project's kernels on the CPU, for tests: this folder comes before CUDA's own
// headers and before csrc/.
//
// A thread of a block is a fiber. Four ways to run the warps take turns from block to block, so that a
// barrier that is missing is seen in the result: in ascending or in descending order, as the blocks of a
// cluster too; and either one after the other, each as far as it gets, or each only when none before it can
// go on, so that the last ones starve. Within a warp, shuffles are barriers. What is asynchronous
// (tile/ptx.hpp, tile/wgmma.hpp) happens as late as it may: a copy when no thread can go on, a product when
// it is waited for. Refused: a warp of which some threads wait at a shuffle or barrier and others do not, a
// load that is not aligned, and threads that wait for each other.
//
// The blocks of a cluster run together, each with dynamic shared memory of its own, which begins when the
// block does.
//
// The blocks of a grid run one after the other, the first one first; the last one where the environment has
// CUDA_EMULATOR_LAST_BLOCK_FIRST.
//
// Not here: device memory, streams, anything else between blocks, the rounding of fast mathematics.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
// One block runs at a time, or several of a cluster, which have dynamic shared memory alone.
#define __shared__ static

#define CUDART_VERSION 13000

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

struct alignas(16) float4 {
    float x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_emulator {

// polling: until the fiber's condition holds.
enum class State { ready, at_shuffle, at_barrier, polling, done };

struct Fiber {
    ucontext_t context;
    dim3 thread;
    unsigned rank;  // of its block in the cluster
    State state;
    bool aside;
    unsigned offered;
    std::function<bool()> condition;
    std::string waits_for;
};

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxCluster = 16;
constexpr size_t kStackBytes = 64 * 1024, kSharedBytes = 227 * 1024;

// A block of the cluster that runs. Dynamic shared memory is NaN when its first thread begins.
struct Block {
    dim3 index;
    bool begun, any;
    alignas(1024) unsigned char shared[(kSharedBytes + 1023) / 1024 * 1024];
};

template <class T>
T* reserve(size_t count) {
    void* memory = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return static_cast<T*>(memory);
}

inline std::vector<Fiber> fibers(kMaxThreads);
inline char* const stacks = reserve<char>(kMaxCluster * kMaxThreads * kStackBytes);
inline Block* const blocks = reserve<Block>(kMaxCluster);
inline unsigned cluster_blocks = 1, cluster_arrived = 0, cluster_passed = 0;
// Of the block whose thread runs.
inline unsigned char* shared_memory = blocks[0].shared;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline bool descending = false, starving = false;
inline bool misaligned = false;
// What a thread did that no GPU would have forgiven.
inline std::string fault;
// Copies that have been started and not made.
inline std::deque<std::function<void()>> copies;
inline void start_copy(std::function<void()> copy) {
    if (descending)
        copy();
    else
        copies.push_back(std::move(copy));
}
// Called before each cluster: what one leaves behind, the next does not find.
inline std::vector<void (*)()> at_block_start;
// makecontext passes no pointer; one kernel runs at a time.
inline void (*run_kernel)(const void*) = nullptr;
inline const void* kernel_call = nullptr;

inline void wait_in(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void wait_until(std::function<bool()> condition, const std::string& name) {
    if (condition()) return;
    fibers[current].condition = std::move(condition);
    fibers[current].waits_for = name;
    wait_in(State::polling);
}

// Lets every other warp go as far as it gets; in a block whose last warps starve, until no thread can go on
// but those that have stepped aside, of which the first warp may then.
inline unsigned round_of_warps = 0, steps_aside = 0, allowed_warp = 0, allowed_steps = 0;
inline void step_aside() {
    if (!starving) {
        const unsigned now = round_of_warps;
        return wait_until([=] { return round_of_warps != now; }, "nothing");
    }
    const unsigned step = ++steps_aside, here = current;
    fibers[here].aside = true;
    wait_until([=] { return allowed_warp == here / kWarp && step <= allowed_steps; }, "nothing");
    fibers[here].aside = false;
}

// Whether there was a thread that had stepped aside.
inline bool let_one_go_on(unsigned threads) {
    for (unsigned turn = 0; turn < threads; ++turn) {
        const unsigned thread = descending ? threads - 1 - turn : turn;
        if (!fibers[thread].aside) continue;
        allowed_warp = thread / kWarp;
        allowed_steps = steps_aside;
        return true;
    }
    return false;
}

inline void start_fiber() {
    run_kernel(kernel_call);
    wait_in(State::done);
}

// Runs a warp as far as it gets; whether it got anywhere.
inline bool run_warp(unsigned first, unsigned end) {
    bool moved = false;
    while (true) {
        bool again = false;
        for (unsigned lane = first; lane < end; ++lane) {
            Fiber& fiber = fibers[lane];
            if (fiber.state == State::polling && fiber.condition()) fiber.state = State::ready;
            if (fiber.state != State::ready) continue;
            again = true;
            current = lane;
            threadIdx = fiber.thread;
            Block& block = blocks[fiber.rank];
            blockIdx = block.index;
            shared_memory = block.shared;
            if (!block.begun) std::fill(block.shared, block.shared + kSharedBytes, 0xFF);
            block.begun = true;
            swapcontext(&scheduler, &fiber.context);
        }
        moved |= again;
        // A thread may have let an earlier one of its warp go on.
        if (again) continue;
        unsigned counts[5] = {};
        for (unsigned lane = first; lane < end; ++lane) ++counts[static_cast<int>(fibers[lane].state)];
        const unsigned at_shuffle = counts[static_cast<int>(State::at_shuffle)];
        const unsigned at_barrier = counts[static_cast<int>(State::at_barrier)];
        // Lanes that wait for something else may yet come.
        if (counts[static_cast<int>(State::polling)] != 0) return moved;
        if (at_shuffle != 0 && at_shuffle != end - first || at_barrier != 0 && at_barrier != end - first)
            throw std::logic_error("cuda_emulator: a warp is divided at a barrier");
        if (at_shuffle == 0) return moved;
        for (unsigned lane = first; lane < end; ++lane) fibers[lane].state = State::ready;
    }
}

// What each thread that is not done waits for.
inline std::string deadlock() {
    std::string said = "cuda_emulator: no thread of block " + std::to_string(blockIdx.x) + " can go on:";
    for (unsigned i = 0; i < cluster_blocks * blockDim.x * blockDim.y * blockDim.z; i += kWarp)
        if (fibers[i].state != State::done)
            said += " thread " + std::to_string(i) + " waits for " +
                    (fibers[i].state == State::polling ? fibers[i].waits_for : "the block") + ";";
    return said;
}

// Runs a block as far as it gets; whether it got anywhere.
inline bool run_block(unsigned rank) {
    const unsigned own = blockDim.x * blockDim.y * blockDim.z, begin = rank * own, end = begin + own;
    const unsigned warps = (own + kWarp - 1) / kWarp;
    for (bool any = false;; any = true) {
        bool moved = false;
        ++round_of_warps;
        for (unsigned turn = 0; turn < warps; ++turn) {
            const unsigned first = begin + (descending ? warps - 1 - turn : turn) * kWarp;
            moved |= run_warp(first, std::min(first + kWarp, end));
            if (!fault.empty()) throw std::logic_error("cuda_emulator: " + fault);
            if (moved && starving) break;
        }
        unsigned at_barrier = 0, done = 0;
        for (unsigned i = begin; i < end; ++i) {
            at_barrier += fibers[i].state == State::at_barrier;
            done += fibers[i].state == State::done;
        }
        if (at_barrier != 0 && at_barrier + done == own) {
            moved = true;
            for (unsigned i = begin; i < end; ++i)
                if (fibers[i].state == State::at_barrier) fibers[i].state = State::ready;
        }
        if (!moved) return any;
    }
}

// The block from blockIdx on, and those of its cluster, whose neighbours in x they are.
inline void run_cluster() {
    const unsigned own = blockDim.x * blockDim.y * blockDim.z, threads = own * cluster_blocks;
    if (fibers.size() < threads) fibers.resize(threads);
    const dim3 first_block = blockIdx;
    for (auto* prepare : at_block_start) prepare();
    cluster_arrived = cluster_passed = 0;
    fault.clear();
    for (unsigned rank = 0; rank < cluster_blocks; ++rank) {
        blocks[rank].index = dim3(first_block.x + rank, first_block.y, first_block.z);
        blocks[rank].begun = false;
    }
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        const unsigned thread = i % own;
        fiber.thread =
            dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y));
        fiber.rank = i / own;
        fiber.state = State::ready;
        fiber.aside = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks + i * kStackBytes;
        fiber.context.uc_stack.ss_size = kStackBytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, start_fiber, 0);
    }
    if (descending) starving = !starving;
    descending = !descending;
    const auto done = [](const Fiber& fiber) { return fiber.state == State::done; };
    while (true) {
        bool moved = false;
        for (unsigned turn = 0; turn < cluster_blocks; ++turn)
            moved |= run_block(descending ? cluster_blocks - 1 - turn : turn);
        if (std::all_of(fibers.begin(), fibers.begin() + threads, done) && copies.empty()) break;
        if (moved) continue;
        if (copies.empty()) {
            if (let_one_go_on(threads)) continue;
            throw std::logic_error(deadlock());
        }
        const auto copy = std::move(copies.front());
        copies.pop_front();
        copy();
        if (!fault.empty()) throw std::logic_error("cuda_emulator: " + fault);
    }
    blockIdx = first_block;
}

}  // namespace cuda_emulator

inline void __syncthreads() {
    cuda_emulator::wait_in(cuda_emulator::State::at_barrier);
}

inline int __syncthreads_or(int value) {
    bool& any = cuda_emulator::blocks[cuda_emulator::fibers[cuda_emulator::current].rank].any;
    __syncthreads();
    any = false;
    __syncthreads();
    any |= value != 0;
    __syncthreads();
    return any;
}

inline void __threadfence() {}

inline int atomicAdd(int* to, int value) {
    const int before = *to;
    *to += value;
    return before;
}

// Every lane of the warp offers a word; use(words of the 32 lanes) is the lane's result.
template <class Use>
auto exchange(unsigned word, const Use& use) {
    using namespace cuda_emulator;
    const unsigned here = current;
    fibers[here].offered = word;
    wait_in(State::at_shuffle);
    const auto result = use(&fibers[here / kWarp * kWarp], here % kWarp);
    wait_in(State::at_shuffle);
    return result;
}

inline void __syncwarp() {
    exchange(0, [](const cuda_emulator::Fiber*, unsigned) { return 0; });
}

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int offset) {
    return exchange(value, [&](const cuda_emulator::Fiber* warp, unsigned lane) {
        return warp[lane ^ static_cast<unsigned>(offset)].offered;
    });
}

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = __shfl_xor_sync(mask, bits, offset);
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

inline int __any_sync(unsigned, bool value) {
    return exchange(value, [](const cuda_emulator::Fiber* warp, unsigned) {
        return std::any_of(warp, warp + cuda_emulator::kWarp,
                           [](const auto& lane) { return lane.offered != 0; });
    });
}

using std::max;
using std::min;

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

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorMisalignedAddress = 716 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
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
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize,
    cudaFuncAttributeNonPortableClusterSizeAllowed
};
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
    return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidConfiguration;
}
inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
    return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    return *version = CUDART_VERSION, cudaSuccess;
}

// Clusters of up to 16 blocks fit, or none where the environment says so.
template <class Params>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Params), const cudaLaunchConfig_t*) {
    return *clusters = std::getenv("CUDA_EMULATOR_NO_CLUSTERS") == nullptr, cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), Params params) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const dim3 grid = config->gridDim, block = config->blockDim;
    const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads > cuda_emulator::kMaxThreads || uint64_t(grid.x) * grid.y * grid.z == 0 ||
        grid.y > 65535 || cluster > cuda_emulator::kMaxCluster || grid.x % cluster != 0)
        return cudaErrorInvalidConfiguration;
    const struct Call {
        void (*kernel)(Params);
        const Params* params;
    } call{kernel, &params};
    cuda_emulator::kernel_call = &call;
    cuda_emulator::run_kernel = [](const void* opaque) {
        const Call& call = *static_cast<const Call*>(opaque);
        call.kernel(*call.params);
    };
    cuda_emulator::cluster_blocks = cluster;
    gridDim = grid;
    blockDim = block;
    const uint64_t clusters = uint64_t(grid.x / cluster) * grid.y * grid.z;
    const bool backwards = std::getenv("CUDA_EMULATOR_LAST_BLOCK_FIRST") != nullptr;
    for (uint64_t i = 0; i < clusters; ++i) {
        const uint64_t place = (backwards ? clusters - 1 - i : i) * cluster, rows = place / grid.x;
        blockIdx = dim3(place % grid.x, rows % grid.y, rows / grid.y);
        cuda_emulator::run_cluster();
    }
    if (!cuda_emulator::misaligned) return cudaSuccess;
    cuda_emulator::misaligned = false;
    return cudaErrorMisalignedAddress;
}

template <class Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
    const cudaLaunchConfig_t config{grid, block, shared, stream, nullptr, 0};
    return cudaLaunchKernelEx(&config, kernel, *static_cast<const Params*>(arguments[0]));
}
