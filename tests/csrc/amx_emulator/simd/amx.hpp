// The verbs of csrc/simd/amx.hpp in C++, for processors without AMX.
//
// The product is what Intel's manual says of TDPBF16PS: in the place of a sum, the 16 even and the 16 odd
// terms are each added up from zero, with fused products; the two are added, and then the sum takes the
// result. Rounding is to nearest, and subnormal numbers count as zero, as in all arithmetic of a kernel
// (FlushDenormals in core/parallel_for.hpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "core/types.hpp"

namespace amx_emulator {

// Row by row float32, or pairs of bfloat16 whose even element is the lower half.
struct Tile {
    uint32_t words[16][16];
};

inline thread_local Tile tiles[8];
inline thread_local bool configured = false;

inline Tile& tile(int number) {
    if (!configured) throw std::logic_error("amx_emulator: a tile is used outside the life of AmxTiles");
    return tiles[number];
}

inline float even(uint32_t pair) {
    return lmkern::bit_cast<float>(pair << 16);
}
inline float odd(uint32_t pair) {
    return lmkern::bit_cast<float>(pair & 0xffff0000);
}

}  // namespace amx_emulator

namespace lmkern {

constexpr int64_t kTileRowBytes = 64;

class AmxTiles {
public:
    AmxTiles() {
        amx_emulator::configured = true;
        std::memset(amx_emulator::tiles, 0, sizeof amx_emulator::tiles);
    }
    ~AmxTiles() { amx_emulator::configured = false; }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;
};

template <int tile>
void tile_zero() {
    amx_emulator::tile(tile) = {};
}

template <int tile, bool passes = false>
void tile_load(const void* rows, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row)
        std::memcpy(amx_emulator::tile(tile).words[row], static_cast<const char*>(rows) + row * stride,
                    kTileRowBytes);
}

template <int tile>
void tile_store(void* rows, int64_t stride) {
    for (int64_t row = 0; row < 16; ++row)
        std::memcpy(static_cast<char*>(rows) + row * stride, amx_emulator::tile(tile).words[row],
                    kTileRowBytes);
}

template <int c, int a, int b>
void tile_product() {
    using namespace amx_emulator;
    Tile& sums = tile(c);
    const Tile &left = tile(a), &right = tile(b);
    for (int row = 0; row < 16; ++row) {
        float evens[16] = {}, odds[16] = {};
        for (int pair = 0; pair < 16; ++pair)
            for (int column = 0; column < 16; ++column) {
                const uint32_t x = left.words[row][pair], y = right.words[pair][column];
                evens[column] = std::fma(even(x), even(y), evens[column]);
                odds[column] = std::fma(odd(x), odd(y), odds[column]);
            }
        for (int column = 0; column < 16; ++column) {
            uint32_t& sum = sums.words[row][column];
            sum = bit_cast<uint32_t>(bit_cast<float>(sum) + (evens[column] + odds[column]));
        }
    }
}

}  // namespace lmkern
