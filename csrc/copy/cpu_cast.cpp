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
        // Neighbouring pieces go to one thread: two threads that write to one fresh page both wait for it.
        const int64_t tasks = std::min(p.threads, pieces);
        const int64_t pieces_per_task = ceil_div(pieces, std::max<int64_t>(tasks, 1));
        parallel_for(tasks, p.threads, [&](int64_t task) {
            const int64_t end = std::min(pieces, (task + 1) * pieces_per_task);
            for (int64_t piece = task * pieces_per_task; piece < end; ++piece) {
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
