// The verbs of AMX: eight tile registers of 16 rows x 64 bytes, and products of bfloat16 pairs into float32.
//
//     C (16 x 16 float32) += A (16 rows x 32 bfloat16) B (16 pairs of rows x 16 columns)
//
// Row p of a B tile holds, column by column, the elements of rows 2p and 2p + 1 side by side.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lmkern {

// Whether the processor has AMX with bfloat16 and the system lets this process use it: asked for once a
// process, before the first tile instruction.
inline bool amx_usable() {
#if defined(__x86_64__) && defined(__linux__)
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if ((edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
    // Linux, arch/x86/include/uapi/asm/prctl.h: the tile data is saved only for those who ask.
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

#if defined(__AMX_BF16__)

constexpr int64_t kTileRowBytes = 64;

// While it lives the calling thread's eight tiles are 16 rows x 64 bytes each. Needed in every thread: tiles
// are registers. Released at the end, so that a context switch has no tile data to save.
class AmxTiles {
public:
    AmxTiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = kTileRowBytes;
            config.rows[tile] = 16;
        }
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    ~AmxTiles() { asm volatile("tilerelease"); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;
};

// GCC's intrinsics are macros that paste the number of a tile: a template parameter needs asm.
template <int tile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// 16 rows of 64 bytes, `stride` bytes apart. passes: they need not stay in the first cache.
template <int tile, bool passes = false>
inline void tile_load(const void* rows, int64_t stride) {
    if (passes)
        asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
    else
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}

template <int tile>
inline void tile_store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(tile) : "memory");
}

// c += a b. Sums in float32; subnormal numbers count as zero.
template <int c, int a, int b>
inline void tile_product() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

#endif

}  // namespace lmkern
