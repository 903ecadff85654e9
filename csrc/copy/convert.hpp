// A row from one element type to another.
#pragma once

#include <cstring>
#include <type_traits>

#include "copy/params.hpp"
#include "simd/row.hpp"

namespace lmkern {

template <class From, class To>
inline void convert_row(const From* x, To* y, int64_t count) {
    if constexpr (std::is_same_v<From, To>) {
        std::memcpy(y, x, static_cast<size_t>(count) * sizeof(To));
    } else if constexpr (sizeof(From) < 8 && sizeof(To) < 8) {
        constexpr int64_t two = 2 * kLanes<float>;
        if (count < two) return for_row_anew<float>(count, [&](auto at) { at.store(y, at(x)); });
        auto convert = [&](int64_t i) { store_two(y + i, load(x + i), load(x + i + kLanes<float>)); };
        int64_t i = 0;
        for (; i + two <= count; i += two) convert(i);
        // The last ones begin in what is done.
        if (i < count) convert(count - two);
    } else {
        for (int64_t i = 0; i < count; ++i) store_one(y + i, static_cast<Compute<To>>(load_one(x + i)));
    }
}

// body(type of x, type of y).
template <class Body>
void with_types(const CopyParams& p, const Body& body) {
    with_type(static_cast<Dtype>(p.from_dtype), [&](auto from) {
        with_any_type(static_cast<Dtype>(p.to_dtype), [&](auto to) { body(from, to); });
    });
}

}  // namespace lmkern
