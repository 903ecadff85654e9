// Tiles that know where they live. sm_90a only.
#pragma once

#include "core/types.hpp"
#include "tile/ptx.hpp"
#include "tile/row.hpp"
#include "tile/wgmma.hpp"

namespace lmkern {

constexpr int kWarpgroup = 128;

// (ROWS, COLUMNS) 16-bit elements in shared memory, as the copy engine writes them and the tensor cores read
// them: chunks of 64 columns one after the other; in a chunk a row is 128 bytes, and the 16 bytes i of row r
// lie at place i ^ (r % 8), so that eight rows of one column lie in eight places ("128-byte swizzle", PTX ISA
// 8.5, sections 5.5.5 and 9.7.15.5.1). Rows and columns are multiples of 8 and 64.
template <class T, int ROWS, int COLUMNS>
struct alignas(1024) SharedTile {
    static constexpr int kRows = ROWS, kColumns = COLUMNS, kBytes = ROWS * COLUMNS * 2;
    static constexpr int kChunkColumns = 64, kChunkBytes = ROWS * 128;

    unsigned char bytes[kBytes];

    // Where an element lies. A pair of columns that begins with an even one is 4 bytes in one piece.
    static __device__ int offset(int row, int column) {
        return (column / 64 * kChunkBytes + row * 128 + row % 8 * 16 + column % 8 * 2) ^ column % 64 / 8 * 16;
    }

    // One thread starts the copy of rows first_row to first_row + ROWS of a head; kBytes are counted.
    __device__ void load(const ptx::TensorMap* map, ptx::Barrier* barrier, int first_row, int head,
                         int batch) {
#pragma unroll
        for (int column = 0; column < COLUMNS; column += kChunkColumns)
            ptx::cp_async_bulk_tensor(bytes + column / 64 * kChunkBytes, map, barrier, column, first_row,
                                      head, batch);
    }

    // For wgmma, a factor whose 16 summands are columns: rows from `row`, a multiple of 8, columns from
    // `column`.
    __device__ uint64_t along_columns(int row, int column) const {
        return descriptor(column / 64 * kChunkBytes + row * 128 + column % 64 * 2, 0);
    }

    // A factor whose 16 summands are rows, a transposed one: rows from `row`, columns from `column`: a
    // multiple of 64 of them, or 32.
    __device__ uint64_t along_rows(int row, int column) const {
        return descriptor(column / 64 * kChunkBytes + row * 128 + column % 64 * 2, kChunkBytes);
    }

private:
    // Units of 16 bytes: the start; the distance of chunks, which only a transposed factor reads; the
    // distance of groups of 8 rows; in the two highest bits the code of the 128-byte swizzle.
    __device__ uint64_t descriptor(int start, int chunk_distance) const {
        const uint64_t address = ptx::shared_address(bytes) + start;
        return (address & 0x3FFFF) >> 4 | static_cast<uint64_t>(chunk_distance >> 4) << 16 |
               uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
    }
};

// (64, COLUMNS) float32 in the registers of a warpgroup, as wgmma leaves its sums (PTX ISA 8.5, figure of
// 9.7.15.5.1.2 "D"): warp w has the rows 16 w to 16 w + 15, and lane l of them the rows l / 4 and l / 4 + 8;
// of each 8 columns it has the pair from 2 (l % 4). The four lanes of a row are a quad.
template <int COLUMNS>
struct RegisterTile {
    float element[COLUMNS / 2];

    // half 0 or 1: the thread's first or second row; pair: of COLUMNS / 8.
    __device__ float& at(int half, int pair, int i) { return element[pair * 4 + half * 2 + i]; }

    static __device__ int row(int half) {
        const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
        return thread / 32 * 16 + thread % 32 / 4 + half * 8;
    }
    static __device__ int column(int pair) { return pair * 8 + static_cast<int>(threadIdx.x) % 4 * 2; }
};

__device__ inline uint32_t packed(float low, float high, bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
__device__ inline uint32_t packed(float low, float high, float16) {
    const __half2 pair = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}

// Rounded to T: the first factor of a product over the columns. Columns 16 i to 16 i + 15 are part[i].
template <class T, int COLUMNS>
struct FactorTile {
    uint32_t part[COLUMNS / 16][4];

    __device__ void round(const RegisterTile<COLUMNS>& from) {
#pragma unroll
        for (int i = 0; i < COLUMNS / 16; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                part[i][j] = packed(from.element[i * 8 + j * 2], from.element[i * 8 + j * 2 + 1], T{});
    }
};

// To rows first_row to first_row + 63 and columns from first_column, a multiple of COLUMNS, of a shared tile.
template <class T, int COLUMNS, int ROWS>
__device__ void store_factor(const FactorTile<T, COLUMNS>& from, SharedTile<T, ROWS, 64>& to, int first_row,
                             int first_column) {
    static_assert(64 % COLUMNS == 0, "store_factor: one chunk, within which a column is an exclusive or");
    const int thread = made_here(static_cast<int>(threadIdx.x)) % kWarpgroup;
    const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
    const int first = made_here(to.offset(row, first_column + thread % 4 * 2));
#pragma unroll
    for (int pair = 0; pair < COLUMNS / 8; ++pair)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            *reinterpret_cast<uint32_t*>(to.bytes + (first ^ pair * 16) + half * 8 * 128) =
                from.part[pair / 2][pair % 2 * 2 + half];
}

// Over the quad: each of its lanes gets the result.
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

// Lane i of a quad has word[j] of column group j; afterwards it has those of group i, in order.
__device__ inline void quad_transpose(uint32_t (&word)[4]) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    const uint32_t a = __shfl_xor_sync(0xFFFFFFFFu, odd ? word[0] : word[1], 1);
    const uint32_t b = __shfl_xor_sync(0xFFFFFFFFu, odd ? word[2] : word[3], 1);
    (odd ? word[0] : word[1]) = a;
    (odd ? word[2] : word[3]) = b;
    const uint32_t c = __shfl_xor_sync(0xFFFFFFFFu, high ? word[0] : word[2], 2);
    const uint32_t e = __shfl_xor_sync(0xFFFFFFFFu, high ? word[1] : word[3], 2);
    (high ? word[0] : word[2]) = c;
    (high ? word[1] : word[3]) = e;
}

// The tile, row r times factor[half], to `to` (rows, columns) of row stride `stride`; 16-byte aligned,
// columns a multiple of 8. A factor of 0 gives 0, whatever the element is.
template <class T, int COLUMNS>
__device__ void store_rows(RegisterTile<COLUMNS>& tile, const float (&factor)[2], T* to, int64_t stride,
                           int64_t rows, int columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = RegisterTile<COLUMNS>::row(half);
#pragma unroll
        for (int first = 0; first < COLUMNS / 8; first += 4) {
            uint32_t word[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float low = tile.at(half, first + j, 0), high = tile.at(half, first + j, 1);
                word[j] = factor[half] == 0.0f ? 0u : packed(low * factor[half], high * factor[half], T{});
            }
            quad_transpose(word);
            const int column = (first + static_cast<int>(threadIdx.x) % 4) * 8;
            if (row < rows && column < columns)
                *reinterpret_cast<uint4*>(to + row * stride + column) =
                    uint4{word[0], word[1], word[2], word[3]};
        }
    }
}

// Rows from `first` on, by `threads` threads of which this is number `thread`. Then a barrier.
template <class T, int ROWS, int COLUMNS>
__device__ void zero_rows(SharedTile<T, ROWS, COLUMNS>& tile, int first, int thread, int threads) {
#pragma unroll 1
    for (int i = thread; i < (ROWS - first) * COLUMNS / 2; i += threads) {
        const int row = first + i / (COLUMNS / 2), column = i % (COLUMNS / 2) * 2;
        *reinterpret_cast<uint32_t*>(tile.bytes + tile.offset(row, column)) = 0;
    }
    ptx::fence_proxy_async();
}

// Which stage of a ring of shared tiles is next, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void next() {
        if (++stage < STAGES) return;
        stage = 0;
        parity ^= 1;
    }
};

}  // namespace lmkern
