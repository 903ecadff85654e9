// The two ways in which attention's products are computed: on vectors, for every type and processor (here),
// and in pairs of bfloat16 (bf16_operands.hpp). An engine says how operands lie and multiplies them; the
// passes say which.
//
//     Left          (rows, depth)     rows as they lie: queries, weights, gradients
//     Right         (depth, columns)  keys and values; transposed from rows, or rows themselves
//     put_left      two vectors of one row of a product's result, rounded to a left operand
//     put_right     two vectors of each of two rows, rounded to a right operand
//
// Operands are padded with zeros to whole blocks. A number of theirs takes kParts of Operand. Sums are kept
// in C.
#pragma once

#include <algorithm>
#include <limits>

#include "attention/params.hpp"
#include "core/workspace.hpp"
#include "simd/tile.hpp"
#include "simd/transpose.hpp"

namespace lmkern {

// One head's (N, D) matrix.
template <class T>
struct Matrix {
    T* data;
    int64_t row_stride, column_stride;

    T* row(int64_t index) const { return data + index * row_stride; }
};

template <class T>
Matrix<T> head_of(const void* tensor, const Strides& strides, int64_t batch, int64_t head,
                  int64_t first_row) {
    T* data = static_cast<T*>(const_cast<void*>(tensor));
    data += batch * strides.batch + head * strides.head + first_row * strides.row;
    return {data, strides.row, strides.column};
}

// Bytes of a result from which on it passes by the caches: whoever reads it next finds little of it there.
constexpr int64_t kStreamed = int64_t{2} << 20;

// Whether rows of a result of so many elements are streamed.
template <class T>
bool streams(const Matrix<T>& to, int64_t D, int64_t elements) {
    constexpr int64_t size = sizeof(T);
    return elements * size >= kStreamed && to.column_stride == 1 && D * size % 64 == 0 &&
           streams_to(to.data, to.row_stride * size);
}

// Columns of a block, from begin to before end; none where that is not more.
struct Columns {
    int64_t begin, end;
};

// What is known of rows that were packed.
template <class C>
struct Packed {
    bool finite = true;
    C largest = 0;         // absolute value of an element
    C largest_square = 0;  // squared norm of a row

    void include(const Packed& other) {
        finite &= other.finite;
        largest = std::max(largest, other.largest);
        largest_square = std::max(largest_square, other.largest_square);
    }
};

// Rows as a left operand, packed or where they lie.
template <class Operand, class C>
struct LeftRows {
    const Operand* data;
    Packed<C> facts;
};

template <class T_>
struct VectorEngine {
    using T = T_;
    using C = Compute<T>;
    using Operand = C;
    static constexpr int64_t kParts = 1;
    using Right = Block<C>;
    using Left = lmkern::Left<C>;

    // Dropout draws the bits of 8 keys at a time.
    static constexpr int64_t kStep = std::max<int64_t>(2 * kLanes<C>, 8);
    // A multiple of the rows of a product's tile, and of the lanes: statistics of rows are vectors.
    static constexpr int64_t kQueries = 48;
    // Keys of a block of scores; keys packed together; keys whose weights meet the values together, where no
    // maximum is looked for.
    static constexpr int64_t kStrip = 64, kKeys = 64, kKeysWeighed = 64;
    // Cache lines of keys, and of values, that are worth fetching beside a row of a strip's weights.
    static constexpr int64_t kLinesAhead = 64;
    // The backward pass: queries of a block of scores, and queries and keys whose products are computed
    // together: a multiple of the terms that a sum adds before it joins the rest.
    static constexpr int64_t kRows = 24, kQueriesTogether = 96, kKeysTogether = 128;
    static constexpr int64_t kRowStep = 2;
    // Whether weights are made in words of 16 bits where scores are bounded by kMostBits: as
    // 2^(score - bound + kWordBits).
    static constexpr bool kWords = false;
    static constexpr C kMostBits = 0, kWordBits = 0;
    static constexpr bool kOneLayout = true;  // a block of results is a left and a right operand

    // Of a packed row, in Operand; of a row of results, in C.
    static int64_t width(int64_t D) { return padded<C>(D); }
    static int64_t columns(int64_t D) { return padded<C>(D); }

    // Rows as a left operand, zeros up to padded_rows. Without `norms` the largest square is not looked for.
    template <bool norms = true>
    static Packed<C> pack_left(Matrix<const T> from, int64_t rows, int64_t D, int64_t padded_rows, C* to) {
        const int64_t stride = width(D);
        Packed<C> packed;
        packed.finite = !pack(from.data, from.row_stride, from.column_stride, rows, D, Block<C>{to, stride});
        std::fill(to + rows * stride, to + padded_rows * stride, C(0));
        if constexpr (sizeof(T) == 2 && norms) {
            Vector<C> largest{};
            for (int64_t i = 0; i < rows; ++i) {
                Vector<C> squares{};
                for (int64_t d = 0; d < stride; d += kLanes<C>) {
                    const Vector<C> v = load(to + i * stride + d);
                    squares += v * v;
                    largest = max(largest, v < 0 ? -v : v);
                }
                packed.largest_square = std::max(packed.largest_square, sum<C>(squares));
            }
            for (int lane = 0; lane < kLanes<C>; ++lane)
                packed.largest = std::max(packed.largest, largest[lane]);
        }
        return packed;
    }

    // The same, or the rows where they lie if they are a left operand.
    template <bool norms>
    static LeftRows<C, C> as_left(Matrix<const T> from, int64_t rows, int64_t D, int64_t padded_rows, C* to) {
        const auto facts = pack_left<norms>(from, rows, D, padded_rows, to);
        return {to, facts};
    }

    static Left left(const C* packed, int64_t D) { return {packed, width(D), 1}; }
    static Left scores_left(const C* block, int64_t stride) { return {block, stride, 1}; }
    static Right scores_right(const C* block, int64_t stride) { return {const_cast<C*>(block), stride}; }

    // The transpose (D, rows) of a packed left operand.
    static int64_t left_transposed_size(int64_t, int64_t) { return 0; }
    static Left left_transposed(const C* left, int64_t, int64_t D, C*) { return {left, 1, width(D)}; }

    // The transpose (D, keys) of rows: blocks of kKeys columns, one after the other. Packs the rows of the
    // keys from `first` on, at most kKeys of one block; clean: with 0 for what is not finite.
    static int64_t right_transposed_size(int64_t keys, int64_t D) { return round_up(keys, kKeys) * D; }
    static Packed<C> pack_right_transposed(Matrix<const T> from, int64_t rows, int64_t D, int64_t first,
                                           C* to) {
        constexpr int64_t lanes = kLanes<C>;
        const int64_t stride = width(D);
        alignas(64) C dense[lanes * kMaxHeadDim];
        Packed<C> packed;
        for (int64_t i = 0; i < round_up(rows, kStep); i += lanes) {
            const auto facts = pack_left({from.row(i), from.row_stride, from.column_stride},
                                         std::clamp<int64_t>(rows - i, 0, lanes), D, lanes, dense);
            packed.include(facts);
            for (int64_t d = 0; d < D; d += lanes) {
                C square[lanes * lanes];
                transpose_square(dense + d, stride, square, lanes);
                const int64_t key = first + i;
                C* place = to + key / kKeys * kKeys * D + key % kKeys;
                for (int64_t j = 0; j < std::min(lanes, D - d); ++j)
                    store(place + (d + j) * kKeys, load(square + j * lanes));
            }
        }
        return packed;
    }
    static Right right_transposed(const C* packed, int64_t key, int64_t D) {
        return {const_cast<C*>(packed) + key / kKeys * kKeys * D + key % kKeys, kKeys};
    }

    // Rows as a right operand (keys, D).
    static int64_t right_rows_size(int64_t keys, int64_t D) { return round_up(keys, kStep) * width(D); }
    template <int64_t unit, bool turns = false>
    static Packed<C> pack_right_rows(Matrix<const T> from, int64_t rows, int64_t D, int64_t first, C* to,
                                     bool clean = false) {
        C* place = to + first * width(D);
        const auto packed = pack_left(from, rows, D, round_up(rows, kStep), place);
        if (clean) clear_left(place, rows, D);
        return packed;
    }
    template <int64_t unit>
    static Right right_rows(const C* packed, int64_t key, int64_t D) {
        return {const_cast<C*>(packed) + key * width(D), width(D)};
    }
    static Right right_column(Right right, int64_t j) { return {right.data + j, right.stride}; }

    // Whether all of a left operand is finite.
    static bool finite_left(const C* left, int64_t rows, int64_t D) {
        Vector<C> odd{};
        for (int64_t i = 0; i < rows * width(D); i += kLanes<C>) odd += load(left + i) * C(0);
        return sum<C>(odd) == 0;
    }
    // 0 for what is not finite.
    static void clear_left(C* left, int64_t rows, int64_t D) {
        const Block<C> block{left, width(D)};
        clear_non_finite(block, rows, width(D), block);
    }

    template <bool turns = false>
    static void put_left(C* place, Vector<C> a, Vector<C> b) {
        store(place, a);
        store(place + kLanes<C>, b);
    }
    static void put_right(C* block, int64_t stride, int64_t row, int64_t column, const Vector<C> v[4]) {
        put_left(block + row * stride + column, v[0], v[1]);
        put_left(block + (row + 1) * stride + column, v[2], v[3]);
    }
    // Rows of a result, row i times factor(i). streams: past the caches, where the engine can.
    template <class Factor>
    static void write_rows(Block<C> from, int64_t rows, int64_t D, Matrix<T> to, bool, const Factor& factor) {
        unpack(from, rows, D, to.data, to.row_stride, to.column_stride, factor);
    }
    // The transpose of a result (D, keys) whose right factor put_right wrote.
    static void write_transposed(Block<C> from, int64_t keys, int64_t D, Matrix<T> to, bool, C factor) {
        constexpr int64_t lanes = kLanes<C>;
        const int64_t stride = width(D);
        C square[lanes * kMaxHeadDim];
        for (int64_t key = 0; key < keys; key += lanes) {
            for (int64_t d = 0; d < stride; d += lanes)
                transpose_square(from.data + d * from.stride + key, from.stride, square + d, stride);
            unpack(Block<C>{square, stride}, std::min(lanes, keys - key), D, to.row(key), to.row_stride,
                   to.column_stride, [&](int64_t) { return factor; });
        }
    }

    // passes: b lies in the second cache and is read for these rows only.
    static void product(Left a, Right b, int64_t rows, int64_t columns, int64_t depth, Block<C> c,
                        bool accumulate, bool /*passes*/ = false) {
        lmkern::product(a, b, rows, columns, depth, c, accumulate);
    }

    // What a thread needs while it multiplies.
    struct Session {
        Session() {}
    };
};

}  // namespace lmkern
