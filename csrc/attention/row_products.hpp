// The product of each row of one matrix with the same row of another: delta of attention's backward pass.
#pragma once

#include "attention/operands.hpp"

namespace lmkern {

template <class E>
class RowProducts {
    using T = typename E::T;
    using C = typename E::C;
    using Operand = typename E::Operand;
    static constexpr int64_t lanes = kLanes<C>;

public:
    // Room for kRows packed rows, for as many right ones, and for the sums of their product.
    RowProducts(int64_t D, Operand* left, Operand* right, Block<C> sums)
        : D_(D), width_(E::width(D)), left_(left), right_(right), sums_(sums) {}

    // products[i] of the first `count` rows. In float32 and float64 each is summed in the order in which a
    // product sums dP: where one key has the weight to itself, and out is its value, dP - delta is then 0 and
    // no rounding error.
    void operator()(Matrix<const T> out, Matrix<const T> dout, int64_t count, C* products) const {
        if constexpr (sizeof(T) == 2)
            for (int64_t i = 0; i < count; ++i) products[i] = of_row(out, dout, i);
        else if constexpr (E::kParts > 1)
            for (int64_t i = 0; i < count; i += E::kRows)
                of_rows_on_diagonal(rows_from(out, i), rows_from(dout, i), std::min(E::kRows, count - i),
                                    products + i);
        else
            for (int64_t i = 0; i < count; i += lanes)
                of_rows(rows_from(out, i), rows_from(dout, i), std::min(lanes, count - i), products + i);
    }

private:
    static Matrix<const T> rows_from(Matrix<const T> matrix, int64_t row) {
        return {matrix.row(row), matrix.row_stride, matrix.column_stride};
    }

    C of_row(Matrix<const T> out, Matrix<const T> dout, int64_t row) const {
        T gathered[2][kMaxHeadDim];
        const T* a = whole_row(out, row, gathered[0]);
        const T* b = whole_row(dout, row, gathered[1]);
        Vector<C> sums{};
        int64_t d = 0;
        for (; d + lanes <= D_; d += lanes) sums += load(a + d) * load(b + d);
        if (d < D_) sums += load(a + d, D_ - d) * load(b + d, D_ - d);
        return sum<C>(sums);
    }

    const T* whole_row(Matrix<const T> from, int64_t row, T* gathered) const {
        if (from.column_stride == 1) return from.row(row);
        for (int64_t d = 0; d < D_; ++d) gathered[d] = from.row(row)[d * from.column_stride];
        return gathered;
    }

    // At most kRows: all products with all, for those on the diagonal.
    void of_rows_on_diagonal(Matrix<const T> out, Matrix<const T> dout, int64_t rows, C* products) const {
        E::template pack_left<false>(dout, rows, D_, E::kRows, left_);
        E::pack_right_transposed(out, rows, D_, 0, right_);
        E::product(E::left(left_, D_), E::right_transposed(right_, 0, D_), E::kRows, E::kRows, D_, sums_,
                   false);
        for (int64_t i = 0; i < rows; ++i) products[i] = sums_.data[i * (sums_.stride + 1)];
    }

    // As many as a vector has lanes, without a product.
    void of_rows(Matrix<const T> out, Matrix<const T> dout, int64_t rows, C* products) const {
        C blocks[2][lanes * kMaxHeadDim];
        if (rows < lanes)
            for (C* block : {blocks[0], blocks[1]}) std::fill_n(block, lanes * width_, C(0));
        pack(out.data, out.row_stride, out.column_stride, rows, D_, Block<C>{blocks[0], width_});
        pack(dout.data, dout.row_stride, dout.column_stride, rows, D_, Block<C>{blocks[1], width_});
        Vector<C> sums{}, part{};
        for (int64_t d = 0; d < D_; d += lanes) {
            if (d % kPartDepth<C> == 0) {
                sums += part;
                part = Vector<C>{};
            }
            C squares[2][lanes * lanes];
            for (int which = 0; which < 2; ++which)
                transpose_square(blocks[which] + d, width_, squares[which], lanes);
            for (int64_t j = 0; j < lanes; ++j)
                part += load(squares[0] + j * lanes) * load(squares[1] + j * lanes);
        }
        store(products, sums + part, rows);
    }

    const int64_t D_, width_;
    Operand *left_, *right_;
    Block<C> sums_;
};

}  // namespace lmkern
