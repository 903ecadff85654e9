// csrc/tile/tensor_map.hpp on the CPU, with the driver's conditions.
#pragma once

#include "tile/ptx.hpp"

using CUtensorMap = lmkern::ptx::TensorMap;

namespace lmkern {

inline CUtensorMap tensor_map(const void* start, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                              int rows) {
    CUtensorMap map{static_cast<const unsigned char*>(start), {}, {}, rows};
    for (int i = 0; i < 4; ++i) map.sizes[i] = sizes[i];
    for (int i = 0; i < 3; ++i) map.strides[i] = strides[i] * 2;
    bool refused = reinterpret_cast<uintptr_t>(start) % 16 != 0 || rows > 256;
    for (int i = 0; i < 3; ++i) refused |= sizes[i] > 1 && map.strides[i] % 16 != 0;
    for (int i = 0; i < 4; ++i) refused |= sizes[i] == 0;
    if (refused) throw std::runtime_error("the CUDA driver refused a tensor map: CUresult 1");
    return map;
}

}  // namespace lmkern
