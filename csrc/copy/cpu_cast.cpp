// Casts on the CPU.
#include <algorithm>

#include "copy/convert.hpp"
#include "copy/cpu.hpp"
#include "core/parallel_for.hpp"

namespace lmkern {

void copy_forward(const CopyParams& p) {
    if (p.transposed != 0) return transposed_copy(p);
    with_types(p, [&](auto from, auto to) {
        using From = typename decltype(from)::type;
        using To = typename decltype(to)::type;
        // Parts of a row, so that one long row is shared out too; a multiple of every vector.
        constexpr int64_t part = 32768;
        const int64_t parts = ceil_div(p.columns, part), pieces = p.batch * p.rows * parts;
        parallel_ranges(pieces, p.threads, p.threads, [&](int64_t begin, int64_t end) {
            for (int64_t piece = begin; piece < end; ++piece) {
                const int64_t row = piece / parts, column = piece % parts * part;
                const int64_t start = row / p.rows * p.batch_stride + row % p.rows * p.row_stride + column;
                convert_row(static_cast<const From*>(p.x) + start,
                            static_cast<To*>(p.y) + row * p.columns + column,
                            std::min(part, p.columns - column));
            }
        });
    });
}

}  // namespace lmkern
