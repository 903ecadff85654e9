// Rows that are packed later, asked for a few cache lines at a time beside other work: memory answers late,
// and a core waits for a dozen lines at a time at most, so that packing alone would wait for most of its
// time.
#pragma once

#include "attention/operands.hpp"

namespace lmkern {

class RowsAhead {
public:
    void clear() { count_ = next_ = lines_ = 0; }

    template <class T>
    void add(Matrix<const T> rows, int64_t count, int64_t D) {
        int64_t bytes = D * static_cast<int64_t>(sizeof(T));
        int64_t stride = rows.row_stride * static_cast<int64_t>(sizeof(T));
        if (count <= 0 || rows.column_stride != 1 || count_ == kStretches) return;
        if (stride == bytes) {
            stride = bytes *= count;
            count = 1;
        }
        const char* first = reinterpret_cast<const char*>(rows.data);
        stretches_[count_++] = {first, first, stride, bytes, count};
        lines_ += count * ceil_div(bytes, 64);
    }

    int64_t lines() const { return lines_; }

    // Asks for the next `lines` lines; beyond the last there is nothing to do.
    void ask(int64_t lines) {
        for (; lines > 0 && next_ < count_; --lines) {
            Stretch& s = stretches_[next_];
            __builtin_prefetch(s.line, 0, 2);
            s.line += 64;
            if (s.line < s.row + s.bytes) continue;
            s.line = s.row += s.stride;
            if (--s.rows == 0) ++next_;
        }
    }

private:
    static constexpr int kStretches = 6;
    struct Stretch {
        const char *line, *row;
        int64_t stride, bytes, rows;
    };
    Stretch stretches_[kStretches];
    int64_t count_ = 0, next_ = 0, lines_ = 0;
};

}  // namespace lmkern
