// Transposing copies on the CPU, with a cast on the way.
//
// A block of as many rows as a vector has elements, and 16 bytes of each, is turned in registers: 16 bytes of
// row r lie in lane r / n of vector r % n, n elements in a lane, and log2(n) rounds of interleaving in lanes
// leave a column in each vector.
#include <algorithm>
#include <utility>

#include "copy/convert.hpp"
#include "copy/cpu.hpp"
#include "core/parallel_for.hpp"

namespace lmkern {
namespace {

// What is turned before the next columns: a line of 16-bit elements of so many rows, which are as many pages
// of x as a processor finds at once. All columns come before the next rows.
constexpr int64_t kStrip = 32, kPanelRows = 128;
// Bytes of y from which on it does not pass through the caches: its rows are a power of two apart as a rule,
// and their lines would drive each other out.
constexpr int64_t kStreamed = 1 << 20;
// Rows of x that make a cache line of y.
template <class E>
constexpr int64_t kLineRows = 64 / sizeof(E);
constexpr int64_t kMaxLineRows = kLineRows<uint16_t>;

// Rows that are asked for ahead where elements are converted first, which is too slow to have many under way.
constexpr int64_t kRowsAhead = 16;

// The bits of elements of whatever type.
template <class T>
using Bits [[gnu::may_alias]] =
    std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

// The lower (half 0) or upper (half 1) halves of the 16-byte lanes of a and b, interleaved.
template <int half, int n, class V, int... i>
inline V interleave(V a, V b, std::integer_sequence<int, i...>) {
    constexpr int count = sizeof...(i);
    return shuffle<(i / n * n + half * n / 2 + i % n / 2 + i % 2 * count)...>(a, b);
}

// y[j][r] = x[r][j] for a whole block.
template <bool streaming, class E>
[[gnu::always_inline]] inline void turn_block(const E* x, int64_t x_stride, E* y, int64_t y_stride) {
    constexpr int n = 16 / sizeof(E), count = kVectorBytes / sizeof(E);
    constexpr auto lanes = std::make_integer_sequence<int, count>{};
    Vector<E> v[n], turned[n];
    for (int r = 0; r < n; ++r) v[r] = bit_cast<Vector<E>>(load_lanes(x + r * x_stride, n * x_stride));
    for (int round = 1; round < n; round *= 2) {
        for (int i = 0; i < n / 2; ++i) {
            turned[2 * i] = interleave<0, n>(v[i], v[i + n / 2], lanes);
            turned[2 * i + 1] = interleave<1, n>(v[i], v[i + n / 2], lanes);
        }
        for (int i = 0; i < n; ++i) v[i] = turned[i];
    }
    for (int j = 0; j < n; ++j) {
        if constexpr (streaming)
            stream_vector(y + j * y_stride, &v[j]);
        else
            std::memcpy(y + j * y_stride, &v[j], kVectorBytes);
    }
}

template <bool streaming, class E>
void turn(const E* x, int64_t x_stride, int64_t rows, int64_t columns, E* y, int64_t y_stride) {
    constexpr int64_t n = 16 / sizeof(E), block_rows = kVectorBytes / sizeof(E);
    // Streamed lines are written whole: blocks that make one come one after the other.
    constexpr int64_t step = streaming ? kLineRows<E> : block_rows;
    int64_t row = 0;
    for (; row + step <= rows; row += step) {
        int64_t column = 0;
        for (; column + n <= columns; column += n)
            for (int64_t r = row; r < row + step; r += block_rows)
                turn_block<streaming>(x + r * x_stride + column, x_stride, y + column * y_stride + r,
                                      y_stride);
        for (; column < columns; ++column)
            for (int64_t r = row; r < row + step; ++r) y[column * y_stride + r] = x[r * x_stride + column];
    }
    for (; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column)
            y[column * y_stride + row] = x[row * x_stride + column];
}

// Some rows of a strip of columns of x, at most kStrip, into as many rows of y.
template <bool streaming, class From, class To>
void turn_strip(const From* x, int64_t x_stride, int64_t rows, int64_t columns, To* y, int64_t y_stride) {
    using E = Bits<To>;
    E* out = reinterpret_cast<E*>(y);
    if constexpr (std::is_same_v<From, To>) {
        turn<streaming>(reinterpret_cast<const E*>(x), x_stride, rows, columns, out, y_stride);
    } else {
        To converted[kMaxLineRows * kStrip];
        for (int64_t row = 0; row < rows; row += kMaxLineRows) {
            const int64_t here = std::min(kMaxLineRows, rows - row);
            for (int64_t r = 0; r < here; ++r) {
                // The processor does not foresee steps of a row; these need not belong to x.
                for (int64_t column = 0; column < kStrip; column += 64 / static_cast<int64_t>(sizeof(From)))
                    __builtin_prefetch(x + (row + r + kRowsAhead) * x_stride + column);
                convert_row(x + (row + r) * x_stride, converted + r * kStrip, columns);
            }
            turn<streaming>(reinterpret_cast<const E*>(converted), kStrip, here, columns, out + row,
                            y_stride);
        }
    }
}

// Columns [first, end) of one matrix.
template <bool streaming, class From, class To>
void turn_columns(const CopyParams& p, int64_t matrix, int64_t first, int64_t end) {
    const From* x = static_cast<const From*>(p.x) + matrix * p.batch_stride;
    To* y = static_cast<To*>(p.y) + matrix * p.columns * p.rows;
    for (int64_t row = 0; row < p.rows; row += kPanelRows)
        for (int64_t column = first; column < end; column += kStrip)
            turn_strip<streaming>(x + row * p.row_stride + column, p.row_stride,
                                  std::min(kPanelRows, p.rows - row), std::min(kStrip, end - column),
                                  y + column * p.rows + row, p.rows);
}

}  // namespace

void transposed_copy(const CopyParams& p) {
    with_types(p, [&](auto from, auto to) {
        using From = typename decltype(from)::type;
        using To = typename decltype(to)::type;
        const int64_t strips = ceil_div(p.columns, kStrip), pieces = p.batch * strips;
        const int64_t row_bytes = p.rows * static_cast<int64_t>(sizeof(To));
        const bool streaming = streams_to(p.y, row_bytes) && p.batch * p.columns * row_bytes >= kStreamed;
        parallel_ranges(pieces, p.threads, p.threads, [&](int64_t begin, int64_t end) {
            for (int64_t piece = begin; piece < end;) {
                const int64_t matrix = piece / strips, strip = piece % strips,
                              count = std::min(strips - strip, end - piece);
                const int64_t first = strip * kStrip, last = std::min(p.columns, first + count * kStrip);
                if (streaming)
                    turn_columns<true, From, To>(p, matrix, first, last);
                else
                    turn_columns<false, From, To>(p, matrix, first, last);
                piece += count;
            }
        });
    });
}

}  // namespace lmkern
