// One small kernel for each verb and type of csrc/tile, called by tests/kernels/test_cuda_verbs.py.
#include "core/cuda_launch.hpp"
#include "tile/exp2.hpp"
#include "tile/tensor_map.hpp"
#include "tile/tiles.hpp"

using namespace lmkern;

namespace {

constexpr int kRows = 64, kColumns = 128, kSteps = 5;

struct Call {
    ptx::TensorMap map;
    const void *a, *b;
    void* out;
    int first_row, first_column;
};

template <class Tile>
__device__ uint16_t& element_of(Tile& tile, int row, int column) {
    return *reinterpret_cast<uint16_t*>(tile.bytes + tile.offset(row, column));
}

// out (kRows, kColumns) = the box of the mapped tensor from first_row on; zeros beyond its end.
__global__ void load_kernel(const __grid_constant__ Call call) {
    struct Shared {
        SharedTile<bfloat16, kRows, kColumns> tile;
        ptx::Barrier full;
    };
    Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.full, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::mbarrier_arrive_expect_tx(&shared.full, sizeof(shared.tile.bytes));
        shared.tile.load(&call.map, &shared.full, call.first_row, 1, 1);
    }
    ptx::mbarrier_wait(&shared.full, 0, "full");
    for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x)
        static_cast<uint16_t*>(call.out)[i] = element_of(shared.tile, i / kColumns, i % kColumns);
}

// The box of the mapped tensor = a (kRows, 64), or += a; nothing beyond its end is touched.
template <bool ADD>
__global__ void store_kernel(const __grid_constant__ Call call) {
    using Tile = SharedTile<bfloat16, kRows, 64>;
    Tile& tile = *reinterpret_cast<Tile*>(ptx::dynamic_shared());
    for (int i = threadIdx.x; i < kRows * 64; i += blockDim.x)
        element_of(tile, i / 64, i % 64) = static_cast<const uint16_t*>(call.a)[i];
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (ADD)
        ptx::cp_reduce_async_bulk_tensor_add(&call.map, tile.bytes, call.first_column, call.first_row, 1, 1);
    else
        ptx::cp_async_bulk_tensor_store(&call.map, tile.bytes, call.first_column, call.first_row, 1, 1);
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group();
}

// out (128,) float32 += a (128,), the bulk copy's own addition.
__global__ void add_kernel(const __grid_constant__ Call call) {
    float* shared = reinterpret_cast<float*>(ptx::dynamic_shared());
    shared[threadIdx.x] = static_cast<const float*>(call.a)[threadIdx.x];
    ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x != 0) return;
    ptx::cp_reduce_async_bulk_add(static_cast<float*>(call.out), shared, 128 * sizeof(float));
    ptx::cp_async_bulk_commit_group();
    ptx::cp_async_bulk_wait_group();
}

// out (64, N) float32 = A @ B, summed over 64. a holds A (64, 64), or its transpose where TRANSPOSE_A; b
// holds B's transpose (N, 64), or B where TRANSPOSE_B, in shared memory from first_column on. REGISTERS: A as
// a FactorTile.
template <class T, int N, bool REGISTERS, int TRANSPOSE_A, int TRANSPOSE_B>
__global__ void product_kernel(const __grid_constant__ Call call) {
    struct Shared {
        SharedTile<T, 64, 64> a;
        SharedTile<T, TRANSPOSE_B ? 64 : N, TRANSPOSE_B ? (N < 64 ? 64 : N) : 64> b;
    };
    Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
    const int first = TRANSPOSE_B ? call.first_column : 0;
    const auto fill = [&](auto& tile, const void* from, int rows, int columns, int first) {
        for (int i = threadIdx.x; i < rows * columns; i += blockDim.x)
            element_of(tile, i / columns, first + i % columns) = static_cast<const uint16_t*>(from)[i];
    };
    fill(shared.a, call.a, 64, 64, 0);
    fill(shared.b, call.b, TRANSPOSE_B ? 64 : N, TRANSPOSE_B ? N : 64, first);
    ptx::fence_proxy_async();
    __syncthreads();
    RegisterTile<N> sums;
    FactorTile<T, 64> factor;
    if constexpr (REGISTERS) {
        RegisterTile<64> a;
        for (int pair = 0; pair < 8; ++pair)
            for (int half = 0; half < 2; ++half)
                for (int i = 0; i < 2; ++i) {
                    T value;
                    value.bits =
                        element_of(shared.a, RegisterTile<64>::row(half), RegisterTile<64>::column(pair) + i);
                    a.at(half, pair, i) = to_float(value);
                }
        factor.round(a);
    }
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
        const uint64_t b = TRANSPOSE_B ? shared.b.along_rows(k, first) : shared.b.along_columns(0, k);
        const uint64_t a = TRANSPOSE_A ? shared.a.along_rows(k, 0) : shared.a.along_columns(0, k);
        if constexpr (REGISTERS)
            ptx::wgmma<TRANSPOSE_B>(sums.element, factor.part[k / 16], b, k > 0, T{});
        else
            ptx::wgmma<TRANSPOSE_A, TRANSPOSE_B>(sums.element, a, b, k > 0, T{});
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>(sums.element);
#pragma unroll
    for (int pair = 0; pair < N / 8; ++pair)
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < 2; ++i)
                static_cast<float*>(
                    call.out)[RegisterTile<N>::row(half) * N + RegisterTile<N>::column(pair) + i] =
                    sums.at(half, pair, i);
}

// A producer's warpgroup gives registers up and copies kSteps boxes of kRows rows through a ring of two; a
// consumer's takes registers and adds each column; then a named barrier lets warp 1 of the producer write the
// sums. out (kColumns,) float32. Compiled for 384 threads: at 256 each would have 232 registers from the start.
__global__ void __launch_bounds__(384, 1) pipeline_kernel(const __grid_constant__ Call call) {
    struct Shared {
        SharedTile<bfloat16, kRows, kColumns> tile[2];
        float sums[kColumns];
        ptx::Barrier full[2], empty[2];
    };
    Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
    constexpr int kSums = 1, kSumThreads = 128 + 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(&shared.full[i], 1);
            ptx::mbarrier_init(&shared.empty[i], 4);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    Ring<2> ring;
    if (threadIdx.x < kWarpgroup) {
        ptx::setmaxnreg_dec<40>();
        if (threadIdx.x == 0)
            for (int step = 0; step < kSteps; ++step) {
                ptx::mbarrier_wait(&shared.empty[ring.stage], ring.parity ^ 1, "empty");
                ptx::mbarrier_arrive_expect_tx(&shared.full[ring.stage], sizeof(shared.tile[0].bytes));
                shared.tile[ring.stage].load(&call.map, &shared.full[ring.stage], step * kRows, 1, 1);
                ring.next();
            }
        if (threadIdx.x / 32 != 1) return;
        ptx::bar_sync(kSums, kSumThreads);
        for (int i = threadIdx.x % 32; i < kColumns; i += 32)
            static_cast<float*>(call.out)[i] = shared.sums[i];
        return;
    }
    ptx::setmaxnreg_inc<232>();
    const int column = static_cast<int>(threadIdx.x) % kWarpgroup;
    float sum = 0.0f;
    for (int step = 0; step < kSteps; ++step) {
        ptx::mbarrier_wait(&shared.full[ring.stage], ring.parity, "full");
        for (int row = 0; row < kRows; ++row) {
            bfloat16 value;
            value.bits = element_of(shared.tile[ring.stage], row, column);
            sum += to_float(value);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty[ring.stage]);
        ring.next();
    }
    shared.sums[column] = sum;
    ptx::bar_arrive(kSums, kSumThreads);
}

// a (64, 64) float32 as a RegisterTile: out (64, 64) bfloat16 once by store_factor through a SharedTile and
// once, behind it, by store_rows, rows from 60 and columns from 56 on left as they are.
__global__ void registers_kernel(const __grid_constant__ Call call) {
    using Tile = SharedTile<bfloat16, 64, 64>;
    Tile& tile = *reinterpret_cast<Tile*>(ptx::dynamic_shared());
    RegisterTile<64> a;
    for (int pair = 0; pair < 8; ++pair)
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < 2; ++i)
                a.at(half, pair, i) = static_cast<const float*>(
                    call.a)[RegisterTile<64>::row(half) * 64 + RegisterTile<64>::column(pair) + i];
    FactorTile<bfloat16, 64> rounded;
    rounded.round(a);
    store_factor(rounded, tile, 0, 0);
    __syncthreads();
    auto* out = static_cast<bfloat16*>(call.out);
    for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) out[i].bits = element_of(tile, i / 64, i % 64);
    const float one[2] = {1.0f, 1.0f};
    store_rows(a, one, out + 64 * 64, 64, 60, 56);
}

// out[i] = 2^a[i], by the polynomial.
__global__ void exp2_kernel(const __grid_constant__ Call call) {
    static_cast<float*>(call.out)[threadIdx.x] =
        exp2_by_polynomial(static_cast<const float*>(call.a)[threadIdx.x]);
}

// Each block of a cluster sends its row of a (16, 16) float32 to the others: out (16, 16) is its transpose.
__global__ void cluster_kernel(const __grid_constant__ Call call) {
    struct Shared {
        float from[kMaxCluster];
        ptx::Barrier arrived;
    };
    Shared& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared());
    const unsigned rank = ptx::cluster_rank(), size = ptx::cluster_size();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&shared.arrived, 1);
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_sync();
    if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(&shared.arrived, size * sizeof(float));
    if (threadIdx.x < size)
        ptx::st_async(&shared.from[rank], &shared.arrived, threadIdx.x,
                      static_cast<const float*>(call.a)[rank * kMaxCluster + threadIdx.x]);
    ptx::mbarrier_wait(&shared.arrived, 0, "arrived");
    if (threadIdx.x < size)
        static_cast<float*>(call.out)[rank * kMaxCluster + threadIdx.x] = shared.from[threadIdx.x];
}

template <class T, bool REGISTERS, int TRANSPOSE_A, int TRANSPOSE_B>
auto product_of(int64_t columns) {
    if constexpr (REGISTERS && TRANSPOSE_B)
        if (columns == 256) return product_kernel<T, 256, REGISTERS, TRANSPOSE_A, TRANSPOSE_B>;
    if (columns == 128) return product_kernel<T, 128, REGISTERS, TRANSPOSE_A, TRANSPOSE_B>;
    if constexpr (!REGISTERS)
        if (columns == 32) return product_kernel<T, 32, REGISTERS, TRANSPOSE_A, TRANSPOSE_B>;
    return product_kernel<T, 64, REGISTERS, TRANSPOSE_A, TRANSPOSE_B>;
}

}  // namespace

// verb: load, store, reduce, add, product, pipeline, registers, exp2, cluster, by their place. size: that of
// the (2, 2, rows, columns) tensor that is mapped; option: of product, 1: float16, 2: A in registers, 4: A
// transposed, 8: B transposed; of cluster its blocks. Null, or what went wrong.
extern "C" const char* run_verb(int verb, const void* a, const void* b, void* out, int64_t rows,
                                int64_t columns, int64_t first_row, int64_t first_column, int64_t option,
                                int64_t stream) {
    static std::string said;
    const auto what = [] { return std::string("tile_verbs"); };
    try {
        Call call{};
        call.a = a, call.b = b, call.out = out;
        call.first_row = static_cast<int>(first_row), call.first_column = static_cast<int>(first_column);
        const bool writes = verb == 1 || verb == 2;
        if (writes || verb == 0 || verb == 5)
            call.map = tensor_map(writes ? out : a, {2, 2, rows, columns},
                                  {2 * rows * columns, rows * columns, columns}, kRows);
        const auto start = [&](void (*kernel)(Call), unsigned threads) {
            launch(kernel, dim3(1), dim3(threads), stream, call, what, 96 * 1024);
        };
        const auto product = [&](auto type) {
            using T = typename decltype(type)::type;
            if (option & 2)
                start(option & 8 ? product_of<T, true, 0, 1>(columns) : product_of<T, true, 0, 0>(columns),
                      128);
            else if (option & 4)
                start(option & 8 ? product_of<T, false, 1, 1>(columns) : product_of<T, false, 1, 0>(columns),
                      128);
            else
                start(option & 8 ? product_of<T, false, 0, 1>(columns) : product_of<T, false, 0, 0>(columns),
                      128);
        };
        switch (verb) {
            case 0: start(load_kernel, 128); break;
            case 1: start(store_kernel<false>, 128); break;
            case 2: start(store_kernel<true>, 128); break;
            case 3: start(add_kernel, 128); break;
            case 4: option & 1 ? product(Type<float16>{}) : product(Type<bfloat16>{}); break;
            case 5: start(pipeline_kernel, 256); break;
            case 6: start(registers_kernel, 128); break;
            case 7: start(exp2_kernel, 128); break;
            case 8:
                if (const auto size = static_cast<unsigned>(option);
                    !launch_clusters(cluster_kernel, dim3(size), dim3(64), size, stream, call, what, 1024))
                    throw std::runtime_error("no room for the cluster");
                break;
        }
    } catch (const std::exception& error) {
        said = error.what();
        return said.c_str();
    }
    return nullptr;
}
