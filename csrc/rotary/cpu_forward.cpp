// Rotary positions on the CPU, forward and backward (docs/kernels/rotary.md):
//
//     y1 = x1 cos - x2 sin,    y2 = x2 cos + x1 sin,    backward with -sin
//
// x1, x2 the halves of the columns that turn, or interleaved their even and odd ones.
#include <algorithm>

#include "core/parallel_for.hpp"
#include "rotary/cpu.hpp"
#include "simd/row.hpp"

namespace lmkern {
namespace {

// Fewer elements than this are not worth another thread.
constexpr int64_t kElementsPerTask = 16384;

template <class T, class C = Compute<T>>
Vector<C> table(const float* p, int64_t count) {
    if constexpr (sizeof(C) == 4) {
        return count < kLanes<C> ? load(p, count) : load(p);
    } else {
        Vector<C> wide{};
        for (int64_t lane = 0; lane < std::min<int64_t>(count, kLanes<C>); ++lane) wide[lane] = p[lane];
        return wide;
    }
}

template <class T>
[[gnu::flatten]] void rotate_halves(const T* x, T* y, const float* cos, const float* sin, int64_t pairs,
                                    Compute<T> sign) {
    using C = Compute<T>;
    for_row<C>(pairs, [&](auto at) {
        const Vector<C> c = table<T>(cos + at.column, pairs - at.column);
        const Vector<C> s = table<T>(sin + at.column, pairs - at.column) * sign;
        const Vector<C> x1 = at(x), x2 = at(x + pairs);
        at.store(y, x1 * c - x2 * s);
        at.store(y + pairs, x2 * c + x1 * s);
    });
}

// The lanes l of a pair of vectors a, b as one; what the interleaved form needs of them.
template <class V, int... lane>
V even_lanes(V a, V b, std::integer_sequence<int, lane...>) {
    return shuffle<2 * lane...>(a, b);
}
template <class V, int... lane>
V odd_lanes(V a, V b, std::integer_sequence<int, lane...>) {
    return shuffle<2 * lane + 1 ...>(a, b);
}
template <int first, class V, int... lane>
V zipped(V a, V b, std::integer_sequence<int, lane...>) {
    constexpr int lanes = sizeof...(lane);
    return shuffle<first + lane / 2 + lane % 2 * lanes...>(a, b);
}

template <class T>
[[gnu::flatten]] void rotate_neighbours(const T* x, T* y, const float* cos, const float* sin, int64_t pairs,
                                        Compute<T> sign) {
    using C = Compute<T>;
    constexpr int64_t lanes = kLanes<C>;
    constexpr auto sequence = std::make_integer_sequence<int, kLanes<C>>{};
    int64_t pair = 0;
    for (; pair + lanes <= pairs; pair += lanes) {
        const Vector<C> first = load(x + 2 * pair), second = load(x + 2 * pair + lanes);
        const Vector<C> x1 = even_lanes(first, second, sequence), x2 = odd_lanes(first, second, sequence);
        const Vector<C> c = table<T>(cos + pair, lanes), s = table<T>(sin + pair, lanes) * sign;
        const Vector<C> y1 = x1 * c - x2 * s, y2 = x2 * c + x1 * s;
        store(y + 2 * pair, zipped<0>(y1, y2, sequence));
        store(y + 2 * pair + lanes, zipped<kLanes<C> / 2>(y1, y2, sequence));
    }
    for (; pair < pairs; ++pair) {
        const C x1 = load_one(x + 2 * pair), x2 = load_one(x + 2 * pair + 1);
        const C c = cos[pair], s = sin[pair] * sign;
        store_one(y + 2 * pair, x1 * c - x2 * s);
        store_one(y + 2 * pair + 1, x2 * c + x1 * s);
    }
}

template <class T>
void rotate_row(const RotaryParams& p, int64_t b, int64_t h, int64_t n) {
    using C = Compute<T>;
    const int64_t position = p.positions == nullptr ? p.offset + n : p.positions[b * p.tokens + n];
    const float* cos = p.cos + position * p.table_stride;
    const float* sin = p.sin + position * p.table_stride;
    const T* x = static_cast<const T*>(p.x) + b * p.x_strides[0] + h * p.x_strides[1] + n * p.x_strides[2];
    T* y = static_cast<T*>(p.y) + b * p.y_strides[0] + h * p.y_strides[1] + n * p.y_strides[2];
    const C sign = p.inverse != 0 ? C(-1) : C(1);
    if (p.interleaved != 0)
        rotate_neighbours(x, y, cos, sin, p.pairs, sign);
    else
        rotate_halves(x, y, cos, sin, p.pairs, sign);
    if (x != y) std::copy(x + 2 * p.pairs, x + p.head_dim, y + 2 * p.pairs);
}

}  // namespace

void rotary_forward(const RotaryParams& p) {
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        // Rows in the order of memory: heads inside tokens, or tokens inside heads.
        const bool heads_inside = p.y_strides[1] < p.y_strides[2];
        const int64_t inner = heads_inside ? p.heads : p.tokens, outer = heads_inside ? p.tokens : p.heads;
        const int64_t rows = p.batch * outer;
        const int64_t ranges = std::min(p.threads, ceil_div(rows * inner * p.head_dim, kElementsPerTask));
        parallel_ranges(rows, ranges, p.threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row)
                for (int64_t i = 0; i < inner; ++i)
                    rotate_row<T>(p, row / outer, heads_inside ? i : row % outer,
                                  heads_inside ? row % outer : i);
        });
    });
}

}  // namespace lmkern
