// What the passes of the norms share: element types, parameters in the type of sums, dropout.
#pragma once

#include "core/parallel_for.hpp"
#include "core/workspace.hpp"
#include "norm/params.hpp"
#include "simd/philox.hpp"
#include "simd/row.hpp"

namespace lmkern {

// Fewer rows than this are not worth another thread.
constexpr int64_t kRowsPerTask = 16;

// Bytes from which on an operand lies in memory: a result passes by the caches, where whoever reads it next
// would find little of it.
constexpr int64_t kLarge = int64_t{8} << 20;
// Rows of at most so many bytes are asked for while the last ones are written, if they lie in memory: the
// processor's own prefetching starts anew with every page. For longer ones it does better alone.
constexpr int64_t kShortRow = 2048;

template <class T>
bool is_large(const NormParams& p) {
    return p.rows * p.columns * static_cast<int64_t>(sizeof(T)) >= kLarge;
}

template <class T>
bool is_streamed(const NormParams& p, const T* result) {
    return is_large<T>(p) && streams_to(result, p.columns * static_cast<int64_t>(sizeof(T)));
}

template <class T>
bool is_prefetched(const NormParams& p) {
    return is_large<T>(p) && p.columns * static_cast<int64_t>(sizeof(T)) <= kShortRow;
}

// Rows may be worked on two at a time: what is known of one waits while the other goes on, and parameters and
// their sums are loaded once. Where rows are long and come from memory, twice the streams cost more than
// that: of more than 384 columns, with AMD's processors (Zen 3 to 5). Intel's (a Xeon with AMX) gain by it up
// to 1,024, backward only where results are streamed.
constexpr int kRowsTogether = 2;
constexpr int64_t kCached = int64_t{4} << 20, kColumnsTogether = 384, kColumnsTogetherOnIntel = 1024;

inline bool on_intel() {
#if defined(__x86_64__)
    static const bool intel = __builtin_cpu_is("intel");
    return intel;
#else
    return false;
#endif
}

template <class T>
bool rows_together(const NormParams& p, bool backward) {
    if (p.rows * p.columns * static_cast<int64_t>(sizeof(T)) < kCached || p.columns <= kColumnsTogether)
        return true;
    return on_intel() && p.columns <= kColumnsTogetherOnIntel && (!backward || is_large<T>(p));
}

// body(row, number of rows) over [begin, end): kRowsTogether at a time if `together`, or one by one.
template <class Body>
void for_rows(bool together, int64_t begin, int64_t end, const Body& body) {
    int64_t row = begin;
    if (together)
        for (; row + kRowsTogether <= end; row += kRowsTogether)
            body(row, std::integral_constant<int, kRowsTogether>{});
    for (; row < end; ++row) body(row, std::integral_constant<int, 1>{});
}

// always_inline: GCC calls it for each vector otherwise.
template <class At, class T, class V>
[[gnu::always_inline]] inline void put(At at, T* row, V v, bool streamed) {
    if (streamed)
        at.stream(row, v);
    else
        at.store(row, v);
}

// body(type of x, type of the residual, whether the norm subtracts the mean).
template <class Body>
void with_types(const NormParams& p, const Body& body) {
    auto with_centring = [&](auto type, auto residual_type) {
        if (p.centred)
            body(type, residual_type, std::true_type{});
        else
            body(type, residual_type, std::false_type{});
    };
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        if constexpr (sizeof(typename decltype(type)::type) == 2)
            if (p.residual_dtype == static_cast<int64_t>(Dtype::float32))
                return with_centring(type, Type<float>{});
        with_centring(type, type);
    });
}

// wide[e] = shift + parameter[e]; without a parameter, absent.
template <class C>
void widen_parameter(const NormParams& p, const void* parameter, C shift, C absent, C* wide) {
    if (parameter == nullptr) {
        std::fill_n(wide, p.columns, absent);
        return;
    }
    with_any_type(static_cast<Dtype>(p.parameter_dtype), [&](auto type) {
        using P = typename decltype(type)::type;
        if constexpr (std::is_same_v<Compute<P>, C>)
            for_row<C>(p.columns,
                       [&](auto at) { at.store(wide, at(static_cast<const P*>(parameter)) + shift); });
    });
}

// Columns whose random bits are drawn at once.
constexpr int kDrawnTogether = 8 * kLanes<uint32_t>;

// A row's place in scratch memory: whole vectors, and whole draws.
inline int64_t scratch_width(const NormParams& p) {
    return round_up(p.columns, kDrawnTogether);
}

// bits[counter][word] = apart[word][counter]. A function of its own: inlined, GCC 12 moves word by word.
template <int counters>
__attribute__((noinline)) void interleave(const uint32_t (&apart)[4][counters],
                                          uint32_t (&__restrict__ bits)[counters][4]) {
    for (int counter = 0; counter < counters; ++counter)
        for (int word = 0; word < 4; ++word) bits[counter][word] = apart[word][counter];
}

// factors[e] = keep_scale for the elements of this row that dropout keeps, 0 for the others: column e takes
// 16 bits of the counter (e / 8, row, 0, 0).
template <class C>
void dropout_factors(const NormParams& p, int64_t row, C* factors) {
    constexpr int counters = kLanes<uint32_t>;
    const Words threshold = Words{} + static_cast<uint32_t>(p.keep_threshold);
    const Vector<float> ones = broadcast(1.0f);
    const auto key = static_cast<uint64_t>(p.seed);
    const C scale = static_cast<C>(p.keep_scale);
    const auto lanes = bit_cast<Words>(lane_indices<float>());
    for (int64_t column = 0; column < p.columns; column += kDrawnTogether) {
        Words words[4] = {lanes + static_cast<uint32_t>(column / 8), Words{} + static_cast<uint32_t>(row)};
        philox(words, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
        uint32_t apart[4][counters], bits[counters][4];
        std::memcpy(apart, words, sizeof apart);
        interleave(apart, bits);
        HalfBits draws[8 * counters / kLanes<float>];
        std::memcpy(draws, bits, sizeof draws);
        for (int part = 0; part < 8 * counters / kLanes<float>; ++part) {
            const Vector<float> kept = widen(draws[part]) >= threshold ? ones : Vector<float>{};
            C* place = factors + column + part * kLanes<float>;
            if constexpr (sizeof(C) == sizeof(float))
                store(place, kept * scale);
            else
                for (int lane = 0; lane < kLanes<float>; ++lane) place[lane] = kept[lane] * scale;
        }
    }
}

}  // namespace lmkern
