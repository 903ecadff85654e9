// csrc/tile/wgmma.hpp on the CPU. Factors are read, and sums written, when a group is waited for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/types.hpp"
#include "tile/ptx.hpp"

namespace cuda_emulator {

struct Product {
    float* d;
    int columns;
    const uint32_t* a_registers;  // null: a in shared memory
    uint64_t a, b;
    bool a_transposed, b_transposed, add, brain;
};

struct Products {
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
};
inline std::vector<Products> products(kMaxThreads);

inline const bool products_registered = [] {
    at_block_start.push_back([] { std::fill(products.begin(), products.end(), Products{}); });
    return true;
}();

inline float widened(uint16_t bits, bool brain) {
    if (!brain) return __half2float(__ushort_as_half(bits));
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

// Element (outer, k) of a factor that a descriptor names; outer: a row of a or a column of b.
inline float factor_at(uint64_t descriptor, bool transposed, int outer, int k, bool brain) {
    const uint32_t start = (descriptor & 0x3FFF) << 4;
    const uint32_t leading = (descriptor >> 16 & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1)
        throw std::logic_error("cuda_emulator: the descriptor is not of the 128-byte swizzle");
    const uint32_t address =
        transposed ? start + outer / 64 * leading + outer % 64 * 2 + k / 8 * stride + k % 8 * 128
                   : start + outer / 8 * stride + outer % 8 * 128 + k * 2;
    uint16_t bits;
    std::memcpy(&bits, shared_memory + lmkern::ptx::swizzled(address), 2);
    return widened(bits, brain);
}

// The thread's elements of one product; `index` is its place in each lane's list.
inline void multiply(const Product& product, unsigned here, size_t group_index) {
    const unsigned lane = here % kWarp, quad = here - lane % 4;
    const int first_row = static_cast<int>(here % 128 / kWarp) * 16 + static_cast<int>(lane / 4);
    float a[2][16];
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k) {
            if (product.a_registers == nullptr) {
                a[half][k] =
                    factor_at(product.a, product.a_transposed, first_row + half * 8, k, product.brain);
                continue;
            }
            const Product& other =
                products[quad + static_cast<unsigned>(k % 8 / 2)].groups.front()[group_index];
            const uint32_t word = other.a_registers[k / 8 * 2 + half];
            a[half][k] = widened(static_cast<uint16_t>(word >> (k % 2 * 16)), product.brain);
        }
    for (int pair = 0; pair < product.columns / 8; ++pair)
        for (int i = 0; i < 2; ++i) {
            const int column = pair * 8 + static_cast<int>(lane % 4) * 2 + i;
            float sum[2] = {0.0f, 0.0f};
            for (int k = 0; k < 16; ++k) {
                const float b = factor_at(product.b, product.b_transposed, column, k, product.brain);
                for (int half = 0; half < 2; ++half) sum[half] += a[half][k] * b;
            }
            for (int half = 0; half < 2; ++half) {
                float& d = product.d[pair * 4 + half * 2 + i];
                d = product.add ? d + sum[half] : sum[half];
            }
        }
}

}  // namespace cuda_emulator

namespace lmkern::ptx {

inline void wgmma_fence() {}

inline void wgmma_commit_group() {
    auto& mine = cuda_emulator::products[cuda_emulator::current];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

template <int pending, class... Results>
void wgmma_wait_group(Results&...) {
    using namespace cuda_emulator;
    const unsigned here = current;
    while (products[here].groups.size() > pending) {
        wait_in(State::at_shuffle);
        const auto& group = products[here].groups.front();
        for (size_t i = 0; i < group.size(); ++i) multiply(group[i], here, i);
        wait_in(State::at_shuffle);
        products[here].groups.pop_front();
    }
}

template <int transpose_a, int transpose_b, int N, class T>
void wgmma(float (&d)[N], uint64_t a, uint64_t b, bool add, T) {
    constexpr bool brain = std::is_same_v<T, bfloat16>;
    cuda_emulator::products[cuda_emulator::current].open.push_back(
        {d, 2 * N, nullptr, a, b, transpose_a != 0, transpose_b != 0, add, brain});
}
template <int transpose_b, int N, class T>
void wgmma(float (&d)[N], const uint32_t (&a)[4], uint64_t b, bool add, T) {
    constexpr bool brain = std::is_same_v<T, bfloat16>;
    cuda_emulator::products[cuda_emulator::current].open.push_back(
        {d, 2 * N, a, 0, b, false, transpose_b != 0, add, brain});
}

}  // namespace lmkern::ptx
