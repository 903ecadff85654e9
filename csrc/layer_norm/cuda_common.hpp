// What the CUDA passes of layer norm share on the host: types, the width of a pack, the words of an error.
#pragma once

#include <initializer_list>
#include <string>
#include <type_traits>

#include "core/cuda_launch.hpp"
#include "core/types.hpp"
#include "layer_norm/params.hpp"

namespace lmkern::cuda {

// body(type of x, type of weight and bias): the same, or float32 parameters beside a 16-bit x.
template <class Body>
void with_types(const LayerNormParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr (std::is_same_v<T, double>) {
            throw std::invalid_argument("layer_norm: the CUDA kernels take no float64");
        } else {
            if constexpr (sizeof(T) == 2)
                if (p.parameter_dtype == static_cast<int64_t>(Dtype::float32))
                    return body(type, Type<float>{});
            body(type, type);
        }
    });
}

// Whether rows of elements of `size` bytes can be read 16 bytes at a time.
inline bool in_packs(const LayerNormParams& p, int64_t size) {
    for (const void* start :
         {p.x, p.weight, p.bias, static_cast<const void*>(p.y), p.dy, static_cast<const void*>(p.dx)})
        if (reinterpret_cast<uintptr_t>(start) % 16 != 0) return false;
    return p.columns * size % 16 == 0 && p.x_stride * size % 16 == 0 && p.dy_stride * size % 16 == 0;
}

inline std::string dtype_name(int64_t code) {
    constexpr const char* names[] = {"float32", "bfloat16", "float16", "float64"};
    return code >= 0 && code < 4 ? names[code] : "unknown";
}

inline std::string describe(const char* pass, const LayerNormParams& p) {
    return std::string("layer_norm ") + pass + " on x (" + std::to_string(p.rows) + ", " +
           std::to_string(p.columns) + ") " + dtype_name(p.dtype) + " of row stride " +
           std::to_string(p.x_stride) + ", weight and bias " + dtype_name(p.parameter_dtype) +
           ", CUDA device " + std::to_string(p.device);
}

}  // namespace lmkern::cuda
