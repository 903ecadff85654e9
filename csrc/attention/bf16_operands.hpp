// Attention's products of bfloat16 pairs, on AMX tiles where there are some; see operands.hpp.
#pragma once

#include "attention/operands.hpp"
#include "simd/bf16_product.hpp"
#include "simd/exp2_words.hpp"

#if defined(__AVX512BF16__)

namespace lmkern {

// T: bfloat16, or float32 in three parts.
template <class T_>
struct Bf16Engine {
    using T = T_;
    using C = float;
    using Operand = bfloat16;
    using Left = Bf16Left;
    using Right = Bf16Right;
    using Session = Bf16Session;

    static constexpr int64_t kParts = sizeof(T) == 4 ? 3 : 1;
    // Elements of a tile, and of 32 numbers of a row, with all parts.
    static constexpr int64_t kTile = kParts * kBf16Tile, kGroup = kParts * 32;
    static constexpr int64_t kStep = 32;
    static constexpr int64_t kQueries = 32;
    static constexpr int64_t kStrip = 64, kKeys = 256, kKeysWeighed = 256;
    static constexpr int64_t kLinesAhead = 4;
    static constexpr int64_t kRows = kParts == 1 ? 32 : 64;
    static constexpr int64_t kQueriesTogether = kParts == 1 ? 128 : 64;
    static constexpr int64_t kKeysTogether = kParts == 1 ? 512 : 256;
    static constexpr int64_t kRowStep = 32;
    static constexpr bool kWords = kParts == 1;
    static constexpr float kMostBits = Exp2Words::kRange / 2, kWordBits = Exp2Words::kScale;
    static constexpr bool kOneLayout = false;

    static int64_t width(int64_t D) { return kParts * round_up(D, 32); }
    static int64_t columns(int64_t D) { return round_up(D, 32); }

    template <bool norms = true, bool stores = true>
    static Packed<float> pack_left(Matrix<const T> from, int64_t rows, int64_t D, int64_t padded_rows,
                                   bfloat16* to) {
        Facts facts;
        for (int64_t i = 0; i < padded_rows; i += 16) {
            alignas(64) float squares[16 * 16];
            for (int64_t r = 0; r < 16; ++r) {
                const T* row = i + r < rows ? from.row(i + r) : nullptr;
                for (int64_t d = 0; d < D; d += 64 / static_cast<int64_t>(sizeof(T)))
                    prefetch_ahead(from, i + r, d);
                T gathered[kMaxHeadDim];
                if (row != nullptr && from.column_stride != 1) {
                    for (int64_t d = 0; d < D; ++d) gathered[d] = row[d * from.column_stride];
                    row = gathered;
                }
                __m512 sum = _mm512_setzero_ps();
                for (int64_t d = 0; d < D; d += 32) {
                    __m512i v[kParts];
                    bf16_load_row(row, d, D, v);
                    for (int64_t p = 0; p < kParts && stores; ++p)
                        _mm512_store_si512(to + (i + r) * width(D) + group(d) + 32 * p, v[p]);
                    facts.element(v[0]);
                    if (norms) sum = _mm512_dpbf16_ps(sum, (__m512bh)v[0], (__m512bh)v[0]);
                }
                if (norms) _mm512_store_ps(squares + r * 16, sum);
            }
            if (!norms) continue;
            transpose_square(squares, 16, squares, 16);
            __m512 square = _mm512_load_ps(squares);
            for (int r = 1; r < 16; ++r) square = _mm512_add_ps(square, _mm512_load_ps(squares + r * 16));
            facts.square(square);
        }
        return facts.packed();
    }

    template <bool norms>
    static LeftRows<bfloat16, float> as_left(Matrix<const T> from, int64_t rows, int64_t D,
                                             int64_t padded_rows, bfloat16* to) {
        if constexpr (kParts == 1)
            if (from.column_stride == 1 && from.row_stride == width(D) && D % 32 == 0 &&
                rows == padded_rows) {
                if (!norms) return {from.data, {}};
                return {from.data, pack_left<true, false>(from, rows, D, rows, nullptr)};
            }
        const auto facts = pack_left<norms>(from, rows, D, padded_rows, to);
        return {to, facts};
    }
    static bool finite_left(const bfloat16* left, int64_t rows, int64_t D) {
        Facts facts;
        for (int64_t i = 0; i < rows * width(D); i += 32) facts.element(_mm512_loadu_si512(left + i));
        return facts.packed().finite;
    }

    static Left left(const bfloat16* packed, int64_t D) { return {packed, width(D)}; }
    static Left scores_left(const bfloat16* block, int64_t stride) { return {block, stride}; }
    // Of put_right's tiles: `stride` columns, tile after tile along the columns.
    static Right scores_right(const bfloat16* block, int64_t stride) {
        return {block, stride / 16 * kTile, kTile, 2 * kTile};
    }

    static int64_t left_transposed_size(int64_t rows, int64_t D) { return round_up(rows, 32) * width(D); }
    static Left left_transposed(const bfloat16* left, int64_t rows, int64_t D, bfloat16* to) {
        const int64_t depth = round_up(rows, 32), stride = kParts * depth;
        for (int64_t i = 0; i < depth; i += 32)
            for (int64_t d = 0; d < columns(D); d += 32)
                for (int64_t part = 0; part < kParts; ++part) {
                    const bfloat16* from = left + i * width(D) + group(d) + 32 * part;
                    bfloat16* place = to + d * stride + group(i) + 32 * part;
                    bf16_transpose(
                        [&](int row) { return _mm512_loadu_si512(from + row * width(D)); },
                        [&](int column, __m512i row) { _mm512_store_si512(place + column * stride, row); });
                }
        return {to, stride};
    }

    static int64_t right_transposed_size(int64_t keys, int64_t D) { return round_up(keys, 32) * width(D); }
    static Packed<float> pack_right_transposed(Matrix<const T> from, int64_t rows, int64_t D, int64_t first,
                                               bfloat16* to) {
        to += first * width(D);
        Facts facts;
        alignas(64) bfloat16 scratch[32 * kMaxHeadDim * kParts];
        for (int64_t i = 0; i < rows; i += 32) {
            const Bf16Left source = whole_rows(from, i, rows, D, scratch);
            for (int64_t half = 0; half < 32; half += 16) {
                __m512 norms = _mm512_setzero_ps();
                // Tile after tile along the depth, of each the parts.
                for (int64_t k = 0; k < width(D); k += 32, to += kBf16Tile) {
                    __m512i block[16];
#pragma GCC unroll 16
                    for (int j = 0; j < 16; ++j) {
                        block[j] = _mm512_loadu_si512(source.data + (half + j) * source.stride + k);
                        if (kParts == 1) prefetch_ahead(from, i + half + j, k);
                    }
                    transpose_registers(block);
#pragma GCC unroll 16
                    for (int j = 0; j < 16; ++j) {
                        _mm512_store_si512(to + j * 32, block[j]);
                        if (k % kGroup == 0)
                            norms = _mm512_dpbf16_ps(norms, (__m512bh)block[j], (__m512bh)block[j]);
                    }
                }
                facts.square(norms);
            }
        }
        return facts.packed();
    }
    static Right right_transposed(const bfloat16* packed, int64_t key, int64_t D) {
        return {packed + key * width(D), kTile, 16 * width(D), 32 * width(D)};
    }

    static int64_t right_rows_size(int64_t keys, int64_t D) { return round_up(keys, 32) * width(D); }
    // In units of so many keys; within a unit all keys of 32 columns lie together: a product reads them in
    // order.
    template <int64_t unit, bool turns = kParts == 3>
    static Packed<float> pack_right_rows(Matrix<const T> from, int64_t rows, int64_t D, int64_t first,
                                         bfloat16* to, bool clean = false) {
        Facts facts;
        alignas(64) bfloat16 scratch[32 * kMaxHeadDim * kParts];
        for (int64_t i = 0; i < rows; i += 32) {
            const Bf16Left source = whole_rows(from, i, rows, D, scratch, clean);
            for (int64_t d = 0; d < columns(D); d += 32)
                for (int64_t part = 0; part < kParts; ++part) {
                    const bfloat16* start = source.data + group(d) + 32 * part;
                    auto row = [&](int64_t j) {
                        return _mm512_loadu_si512(start + row_at<turns>(j) * source.stride);
                    };
                    bfloat16* place = right_place<unit>(to, first + i, d, D) + part * kBf16Tile;
#pragma GCC unroll 16
                    for (int64_t p = 0; p < 16; ++p, place += 32) {
                        const __m512i even = row(2 * p), odd = row(2 * p + 1);
                        if (kParts == 1)
                            for (int64_t j = 0; j < 2; ++j) prefetch_ahead(from, i + 2 * p + j, d);
                        __m512i tiles[2];
                        bf16_pair(even, odd, &tiles[0], &tiles[1]);
                        _mm512_store_si512(place, tiles[0]);
                        _mm512_store_si512(place + kTile, tiles[1]);
                        if (part == 0) facts.element(even), facts.element(odd);
                    }
                }
        }
        return facts.packed();
    }
    // Of keys of one unit.
    template <int64_t unit>
    static Right right_rows(const bfloat16* packed, int64_t key, int64_t D) {
        return {right_place<unit>(packed, key, 0, D), 2 * kTile, kTile, unit / 16 * kTile};
    }
    static Right right_column(Right right, int64_t j) { return right.column(j); }

    static void clear_left(bfloat16* left, int64_t rows, int64_t D) {
        const __m512i infinity = _mm512_set1_epi16(0x7f80);
        for (int64_t i = 0; i < rows * width(D); i += 32) {
            const __m512i v = _mm512_load_si512(left + i);
            const __m512i size = _mm512_and_si512(v, _mm512_set1_epi16(0x7fff));
            _mm512_store_si512(left + i, _mm512_maskz_mov_epi16(_mm512_cmplt_epu16_mask(size, infinity), v));
        }
    }

    static __m512i rounded(Vector<float> a, Vector<float> b) {
        return (__m512i)_mm512_cvtne2ps_pbh(bit_cast<__m512>(b), bit_cast<__m512>(a));
    }
    // Parts come by turns, and with `turns` all elements do: those of a and of b, as pack_right_rows has
    // them.
    template <bool turns = kParts == 3>
    static void put_left(bfloat16* place, Vector<float> a, Vector<float> b) {
        if constexpr (kParts == 1) {
            const __m512i both = rounded(a, b);
            _mm512_store_si512(place, turns ? _mm512_permutexvar_epi16(side_by_side(), both) : both);
        } else {
            __m512i first[3], second[3];
            bf16_split(bit_cast<__m512>(a), first);
            bf16_split(bit_cast<__m512>(b), second);
            for (int64_t p = 0; p < kParts; ++p)
                _mm512_store_si512(place + 32 * p, bf16_by_turns(first[p], second[p]));
        }
    }
    // Plus the 32 elements that lie there.
    static Vector<float> plus_left(Vector<float> sums, const bfloat16* place) {
        const __m512i ones = _mm512_set1_epi16(0x3f80);
        return bit_cast<Vector<float>>(
            _mm512_dpbf16_ps(bit_cast<__m512>(sums), (__m512bh)_mm512_load_si512(place), (__m512bh)ones));
    }
    // Weights of a row of scores, by turns; they are added to a vector of sums, and the largest words kept.
    // seen(): of a `hidden` row the columns that have a weight.
    template <bool hidden, class Seen>
    [[gnu::always_inline]] static void put_word_row(const float* scores, int64_t keys, const Exp2Words& exp2,
                                                    const Seen& seen, float* sums, float* largest,
                                                    bfloat16* out) {
        const __m512i ones = _mm512_set1_epi16(0x3f80);
        __m512 sum = _mm512_load_ps(sums);
        __m512i top = _mm512_load_si512(largest), column{}, begin{}, end{};
        if constexpr (hidden) {
            const Columns columns = seen();
            column = side_by_side();
            begin = _mm512_set1_epi16(static_cast<short>(columns.begin));
            end = _mm512_set1_epi16(static_cast<short>(columns.end));
        }
        for (int64_t j = 0; j < keys; j += 32) {
            const __m512i x = exp2.words(_mm512_load_ps(scores + j), _mm512_load_ps(scores + j + 16));
            __m512i weights;
            if constexpr (hidden) {
                const __mmask32 mask =
                    _mm512_mask_cmplt_epu16_mask(_mm512_cmpge_epu16_mask(column, begin), column, end);
                weights = exp2.rounded(x, mask);
                top = _mm512_mask_max_epu16(top, mask, top, x);
                column = _mm512_add_epi16(column, _mm512_set1_epi16(32));
            } else {
                weights = exp2.rounded(x);
                top = _mm512_max_epu16(top, x);
            }
            _mm512_store_si512(out + j, weights);
            sum = _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)ones);
        }
        _mm512_store_ps(sums, sum);
        _mm512_store_si512(largest, top);
    }
    // Weights of rows of scores as a left operand, by turns; each row's are added to a vector of sums, and
    // the largest words kept. seen(i): of `hidden` rows the columns that have a weight.
    template <bool hidden, class Seen>
    static void put_words(Block<float> scores, int64_t keys, int64_t rows, const Exp2Words& exp2,
                          const Seen& seen, float* sums, float* largest, bfloat16* out, int64_t stride) {
        for (int64_t i = 0; i < rows; ++i)
            put_word_row<hidden>(
                scores.data + i * scores.stride, keys, exp2, [&] { return seen(i); }, sums + i * 16,
                largest + i * 16, out + i * stride);
        for (int64_t i = rows; i < round_up(rows, kRowStep); ++i)
            std::memset(out + i * stride, 0, static_cast<size_t>(keys) * sizeof(bfloat16));
    }
    // Of the largest weights of 16 rows, exact less rounded.
    static Vector<float> error_of_largest(const float* largest) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(largest + i * 16);
        transpose_registers(rows);
        __m512i top = rows[0];
        for (int i = 1; i < 16; ++i) top = _mm512_max_epu16(top, rows[i]);
        top = _mm512_max_epu16(_mm512_and_si512(top, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32(top, 16));
        return Exp2Words(1, 0).error(bit_cast<Vector<uint32_t>>(top));
    }
    static void put_right(bfloat16* block, int64_t stride, int64_t row, int64_t column,
                          const Vector<float> v[4]) {
        bfloat16* tile = block + row / 32 * (stride / 16 * kTile) + column / 16 * kTile + row % 32 / 2 * 32;
        if constexpr (kParts == 1) {
            // Unpacking interleaves within 128 bits, so the keys of 32 columns come in the order of
            // key_of_column.
            const __m512i even = rounded(v[0], v[1]), odd = rounded(v[2], v[3]);
            _mm512_store_si512(tile, _mm512_unpacklo_epi16(even, odd));
            _mm512_store_si512(tile + kTile, _mm512_unpackhi_epi16(even, odd));
        } else {
            for (int64_t half = 0; half < 2; ++half) {
                __m512i even[3], odd[3];
                bf16_split(bit_cast<__m512>(v[half]), even);
                bf16_split(bit_cast<__m512>(v[2 + half]), odd);
                for (int64_t p = 0; p < kParts; ++p)
                    _mm512_store_si512(tile + half * kTile + p * kBf16Tile, bf16_by_turns(even[p], odd[p]));
            }
        }
    }
    template <class Factor>
    static void write_rows(Block<float> from, int64_t rows, int64_t D, Matrix<T> to, bool streams,
                           const Factor& factor) {
        for (int64_t i = 0; i < rows; ++i) {
            const float scale = factor(i);
            for (int64_t d = 0; d < D; d += kLine)
                write_line(to, i, d, D, line(from.data + i * from.stride + d, scale), streams);
        }
    }
    static void write_transposed(Block<float> from, int64_t keys, int64_t D, Matrix<T> to, bool streams,
                                 float factor) {
        for (int64_t column = 0; column < round_up(keys, 32); column += 16)
            for (int64_t d = 0; d < D; d += kLine) {
                __m512i block[16];
                const float* place = from.data + d * from.stride + column;
#pragma GCC unroll 16
                for (int p = 0; p < 16; ++p, place += kLine / 16 * from.stride)
                    if constexpr (kParts == 1)
                        block[p] = _mm512_permutexvar_epi16(
                            side_by_side(),
                            rounded(load(place) * factor, load(place + from.stride) * factor));
                    else
                        block[p] = line(place, factor);
                transpose_registers(block);
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) {
                    const int64_t key = key_of_column(column + i);
                    if (key < keys) write_line(to, key, d, D, block[i], streams);
                }
            }
    }

    static void product(Left a, Right b, int64_t rows, int64_t columns, int64_t depth, Block<float> c,
                        bool accumulate, bool passes = false) {
        bf16_product<kParts>(a, b, rows, columns, round_up(depth, 32), c.data, c.stride, accumulate, passes);
    }

private:
    template <int64_t unit, class Pointer>
    static Pointer right_place(Pointer packed, int64_t key, int64_t column, int64_t D) {
        return packed + key / unit * unit * width(D) + (column * unit + key % unit * 32) * kParts;
    }

    // Where a row's numbers from `column` on lie, a multiple of 32.
    static int64_t group(int64_t column) { return column / 32 * kGroup; }

    // 0, 16, 1, 17, ...
    static __m512i side_by_side() {
        const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(16)), 16));
    }

    // The key that stands in a column of what put_right wrote.
    static int64_t key_of_column(int64_t column) {
        if (kParts > 1) return column;
        const int64_t c = column % 32;
        return column - c + c % 16 / 4 * 8 + c / 16 * 4 + c % 4;
    }

    // Elements of a cache line.
    static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));

    // A line of results out of sums, times factor.
    static __m512i line(const float* place, float factor) {
        if constexpr (kParts == 1)
            return rounded(load(place) * factor, load(place + 16) * factor);
        else
            return bit_cast<__m512i>(load(place) * factor);
    }

    // Up to a line of elements of row i from column d on.
    static void write_line(Matrix<T> to, int64_t i, int64_t d, int64_t D, __m512i line, bool streams) {
        T* place = to.row(i) + d * to.column_stride;
        if (streams) return stream_vector(place, &line);
        const int64_t count = std::min(kLine, D - d);
        if (to.column_stride == 1 && count == kLine) return _mm512_storeu_si512(place, line);
        alignas(64) T elements[kLine];
        _mm512_store_si512(elements, line);
        for (int64_t j = 0; j < count; ++j) place[j * to.column_stride] = elements[j];
    }

    // Asks for what lies 32 rows on: a few lines at a time, since a core waits for a dozen at most, and
    // beyond the last row too, where mostly the next head begins.
    static void prefetch_ahead(Matrix<const T> from, int64_t row, int64_t d) {
        const int64_t place = (row + 32) * from.row_stride + d * from.column_stride;
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(from.data) +
                                                         place * static_cast<intptr_t>(sizeof(T))));
    }

    // Collects what is known of packed elements.
    class Facts {
    public:
        void element(__m512i v) {
            largest_ = _mm512_max_epu16(largest_, _mm512_and_si512(v, _mm512_set1_epi16(0x7fff)));
        }
        // The squared norms of 16 rows.
        void square(__m512 norms) {
            square_ = _mm512_max_ps(square_, norms);
            // NaN and infinity stay, whatever the maximum makes of them.
            odd_ = _mm512_add_ps(odd_, _mm512_mul_ps(norms, _mm512_setzero_ps()));
        }
        Packed<float> packed() const {
            uint16_t bits[32];
            float squares[16], odd[16];
            _mm512_storeu_si512(bits, largest_);
            _mm512_storeu_ps(squares, square_);
            _mm512_storeu_ps(odd, odd_);
            const uint16_t largest = *std::max_element(bits, bits + 32);
            Packed<float> packed;
            packed.finite = largest < 0x7f80 && std::all_of(odd, odd + 16, [](float x) { return x == 0; });
            packed.largest = bit_cast<float>(static_cast<uint32_t>(largest) << 16);
            packed.largest_square = *std::max_element(squares, squares + 16);
            return packed;
        }

    private:
        __m512i largest_ = _mm512_setzero_si512();
        __m512 square_ = _mm512_setzero_ps(), odd_ = _mm512_setzero_ps();
    };

    // 32 rows from row i on that may be read to the full width: the matrix itself where it is whole there,
    // else a copy.
    static Bf16Left whole_rows(Matrix<const T> from, int64_t i, int64_t rows, int64_t D, bfloat16* scratch,
                               bool clean = false) {
        if constexpr (kParts == 1)
            if (from.column_stride == 1 && D % 32 == 0 && i + 32 <= rows && !clean) {
                return {from.row(i), from.row_stride};
            }
        pack_left<false>({from.row(i), from.row_stride, from.column_stride}, std::min<int64_t>(rows - i, 32),
                         D, 32, scratch);
        if (clean) clear_left(scratch, 32, D);
        return {scratch, width(D)};
    }

    // The row that stands in place i of 32.
    template <bool turns>
    static int64_t row_at(int64_t i) {
        return turns ? i / 2 + i % 2 * 16 : i;
    }
};

}  // namespace lmkern

#endif
