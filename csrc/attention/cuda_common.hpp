// What the CUDA passes of attention share.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "attention/cuda.hpp"
#include "attention/tile_schedule.hpp"
#include "core/cuda_launch.hpp"
#include "core/types.hpp"
#include "tile/tensor_map.hpp"
#include "tile/tiles.hpp"

namespace lmkern::cuda {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// body(type, head_dim of the tiles): bfloat16 or float16, and the next of 64, 128 and 256.
template <class Body>
void with_tile(const AttentionParams& p, const Body& body) {
    const auto with_head_dim = [&](auto type) {
        if (p.head_dim <= 64) return body(type, std::integral_constant<int, 64>{});
        if (p.head_dim <= 128) return body(type, std::integral_constant<int, 128>{});
        if (p.head_dim <= 256) return body(type, std::integral_constant<int, 256>{});
        throw std::invalid_argument("attention: the CUDA kernels take head_dim up to 256");
    };
    switch (static_cast<Dtype>(p.dtype)) {
        case Dtype::bfloat16: return with_head_dim(Type<bfloat16>{});
        case Dtype::float16: return with_head_dim(Type<float16>{});
        default: throw std::invalid_argument("attention: the CUDA kernels take bfloat16 and float16");
    }
}

// The copy engine's view of a (B, H, N, D) tensor, in boxes of `rows` tokens and 64 columns; of an empty one,
// of which the driver makes no map and nothing is copied, none. what() gives the words for an error.
template <class What>
CUtensorMap map_of(const What& what, const void* start, const Strides& strides, int64_t batch, int64_t heads,
                   int64_t tokens, int64_t head_dim, int rows) {
    if (tokens == 0) return {};
    try {
        return tensor_map(start, {batch, heads, tokens, head_dim}, {strides.batch, strides.head, strides.row},
                          rows);
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(what() + ": " + error.what());
    }
}

template <class T>
__device__ T* at(void* start, const Strides& strides, int64_t batch, int64_t head, int64_t row) {
    return static_cast<T*>(start) + batch * strides.batch + head * strides.head + row * strides.row;
}

inline std::string describe(const char* pass, const CudaAttentionParams& call) {
    const AttentionParams& p = call.attention;
    const auto shape = [&](int64_t heads, int64_t tokens) {
        return "(" + std::to_string(p.batch) + ", " + std::to_string(heads) + ", " + std::to_string(tokens) +
               ", " + std::to_string(p.head_dim) + ")";
    };
    return std::string("attention ") + pass + " on q " + shape(p.heads, p.n_q) + ", k and v " +
           shape(p.heads_kv, p.n_k) + ", " + std::to_string(p.sequences) + " sequences, CUDA device " +
           std::to_string(call.device);
}

}  // namespace lmkern::cuda
