// What the CUDA passes of the norms share: types, the width of a pack, dropout, the words of an error.
#pragma once

#include <initializer_list>
#include <string>

#include "core/cuda_launch.hpp"
#include "core/types.hpp"
#include "norm/cuda.hpp"
#include "tile/philox.hpp"
#include "tile/row.hpp"

namespace lmkern::cuda {

// body(type of x, type of the residual): the same, or a float32 residual beside a 16-bit x. Whether there is
// a residual, what norm it is and what type parameters have are branches at run time, the same for a whole
// grid.
template <class Body>
void with_types(const NormParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        if constexpr (std::is_same_v<T, double>) {
            throw std::invalid_argument("norm: the CUDA kernels take no float64");
        } else {
            if constexpr (sizeof(T) == 2)
                if (p.residual_dtype == static_cast<int64_t>(Dtype::float32))
                    return body(type, Type<float>{});
            body(type, type);
        }
    });
}

// Whether every row, of elements of the two sizes, can be read 16 bytes at a time.
inline bool in_packs(const NormParams& p, int64_t size, int64_t residual_size) {
    for (const void* start :
         {p.x, p.residual, p.weight, p.bias, static_cast<const void*>(p.y), static_cast<const void*>(p.h),
          p.dy, p.dh, static_cast<const void*>(p.dx), static_cast<const void*>(p.dresidual)})
        if (reinterpret_cast<uintptr_t>(start) % 16 != 0) return false;
    for (const int64_t elements : {p.columns, p.x_stride, p.dy_stride})
        if (elements * size % 16 != 0) return false;
    for (const int64_t elements : {p.residual_stride, p.h_stride, p.dh_stride})
        if (elements * residual_size % 16 != 0) return false;
    return true;
}

// body(type of x, type of the residual, elements of a pack).
template <class Body>
void with_types_and_packs(const NormParams& p, const Body& body) {
    with_types(p, [&](auto type, auto residual_type) {
        using T = typename decltype(type)::type;
        using S = typename decltype(residual_type)::type;
        if (in_packs(p, sizeof(T), sizeof(S)))
            body(type, residual_type, std::integral_constant<int, 16 / sizeof(T)>{});
        else
            body(type, residual_type, std::integral_constant<int, 1>{});
    });
}

// The elements of weight or bias from `column`, T or float32; `absent` if there is no such vector.
template <class T, int W>
__device__ Pack<float, W> load_parameter(const NormParams& p, const void* vector, int column, float shift,
                                         float absent) {
    Pack<float, W> pack;
#pragma unroll
    for (int w = 0; w < W; ++w) pack.element[w] = absent;
    if (vector == nullptr) return pack;
    if (p.parameter_dtype == static_cast<int64_t>(Dtype::float32))
        pack = load_pack<W>(static_cast<const float*>(vector) + column);
    else
        pack = to_float(load_pack<W>(static_cast<const T*>(vector) + column));
#pragma unroll
    for (int w = 0; w < W; ++w) pack.element[w] += shift;
    return pack;
}

// Multiplies by keep_scale where dropout keeps an element, by 0 elsewhere.
template <int W>
__device__ void drop(const NormParams& p, int64_t row, int column, Pack<float, W>& pack) {
    if (p.keep_threshold == 0) return;
    uint32_t halves[W];
    random_halves<W>(*reinterpret_cast<const uint64_t*>(p.seed), row, column, halves);
#pragma unroll
    for (int w = 0; w < W; ++w)
        pack.element[w] *=
            halves[w] >= static_cast<uint32_t>(p.keep_threshold) ? static_cast<float>(p.keep_scale) : 0.0f;
}

// The blocks among which a row is shared out, and the columns of each; size 0: it is too wide.
struct Cluster {
    unsigned size;
    int64_t share;
};

// Blocks of at most `good` columns, or where 8 of them are too few, of `most`.
inline Cluster cluster_for(int64_t columns, int64_t good, int64_t most) {
    for (const unsigned size : {2u, 4u, 8u})
        if (columns <= size * good) return {size, ceil_div(columns, size)};
    for (const unsigned size : {8u, 16u})
        if (columns <= size * most) return {size, ceil_div(columns, size)};
    return {0, 0};
}

inline std::string dtype_name(int64_t code) {
    constexpr const char* names[] = {"float32", "bfloat16", "float16", "float64"};
    return code >= 0 && code < 4 ? names[code] : "unknown";
}

inline std::string describe(const char* pass, const CudaNormParams& p) {
    const NormParams& n = p.norm;
    return std::string(n.centred ? "layer norm " : "RMS norm ") + pass + " on (" + std::to_string(n.rows) +
           ", " + std::to_string(n.columns) + ") " + dtype_name(n.dtype) + ", residual " +
           dtype_name(n.residual_dtype) + ", weight and bias " + dtype_name(n.parameter_dtype) +
           ", CUDA device " + std::to_string(p.device);
}

}  // namespace lmkern::cuda
