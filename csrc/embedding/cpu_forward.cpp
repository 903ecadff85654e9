// Embedding forward on the CPU: rows of the weight, copied.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/parallel_for.hpp"
#include "core/types.hpp"
#include "embedding/cpu.hpp"

namespace lmkern {
namespace {

[[noreturn]] void refuse(const EmbeddingParams& p) {
    const auto [low, high] = std::minmax_element(p.tokens, p.tokens + p.count);
    throw std::out_of_range("embedding: tokens must lie in [0, " + std::to_string(p.vocabulary) + "); got " +
                            std::to_string(*low) + " to " + std::to_string(*high));
}

}  // namespace

void embedding_forward(const EmbeddingParams& p) {
    std::atomic<bool> outside{false};
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        // Fewer elements than this are not worth another thread.
        constexpr int64_t elements_per_task = 32768;
        const int64_t ranges = std::min(p.threads, ceil_div(p.count * p.columns, elements_per_task));
        const size_t row_bytes = static_cast<size_t>(p.columns) * sizeof(T);
        parallel_ranges(p.count, ranges, p.threads, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const int64_t token = p.tokens[row];
                if (token < 0 || token >= p.vocabulary)
                    outside = true;
                else
                    std::memcpy(static_cast<T*>(p.y) + row * p.columns,
                                static_cast<const T*>(p.weight) + token * p.columns, row_bytes);
            }
        });
    });
    if (outside) refuse(p);
}

}  // namespace lmkern
