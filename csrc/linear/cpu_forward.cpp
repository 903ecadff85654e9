// A linear map of a few rows on the CPU: the weight is read from memory once, whatever the number of rows.
#include <algorithm>
#include <type_traits>

#include "core/parallel_for.hpp"
#include "core/workspace.hpp"
#include "linear/cpu.hpp"
#include "simd/few_rows.hpp"

namespace lmkern {
namespace {

// Rows of the weight that are taken through at once, a multiple of every vector's lanes.
constexpr int64_t kOutputsTogether = 64;
// How far ahead of its use a row is asked for, into the first cache and into the second: pages end every
// 4 KiB, and the processor's own prefetching with them.
constexpr int64_t kNearBytes = 3072, kFarBytes = 16384;
// Fewer elements of the weight than this are not worth another thread.
constexpr int64_t kElementsPerTask = 32768;

// The outputs from `first` to `end`.
template <class T, class Order>
void forward_outputs(const LinearParams& p, int64_t first, int64_t end) {
    using C = Compute<T>;
    const int64_t K = p.inputs, width = padded<C>(K), row_bytes = p.weight_stride * int64_t{sizeof(T)};
    auto rows_of = [&](int64_t bytes) {
        return std::clamp<int64_t>(bytes / std::max<int64_t>(row_bytes, 1), 1, kOutputsTogether);
    };
    const Ahead ahead{rows_of(kNearBytes), rows_of(kFarBytes)};
    const int64_t listed = kOutputsTogether + std::max(ahead.near, ahead.far);
    Workspace& workspace = Workspace::of_this_thread();
    workspace.reserve(sizeof(T*) * static_cast<size_t>(listed) +
                      sizeof(C) * static_cast<size_t>((p.rows + 1) * width + p.rows * kOutputsTogether));
    const T** const weights = workspace.take<const T*>(listed);
    const Block<C> ordered{workspace.take<C>(width), width};
    const Block<C> x{workspace.take<C>(p.rows * width), width};
    const Block<C> y{workspace.take<C>(p.rows * kOutputsTogether), kOutputsTogether};
    for (int64_t row = 0; row < p.rows; ++row) {
        pack(static_cast<const T*>(p.x) + row * p.x_stride, 0, 1, 1, K, ordered);
        for (int64_t k = 0; k < width; ++k)
            x.data[row * width + place_of<Order>(k, kLanes<C>)] = ordered.data[k];
    }
    for (int64_t n = first; n < end; n += kOutputsTogether) {
        const int64_t outputs = std::min(kOutputsTogether, end - n);
        // Behind the last row comes the last row again.
        for (int64_t j = 0; j < listed; ++j)
            weights[j] = static_cast<const T*>(p.weight) + std::min(n + j, end - 1) * p.weight_stride;
        score_rows<Order>(x, p.rows, weights, padded<C>(outputs), ahead, K, y);
        for (int64_t row = 0; row < p.rows; ++row) {
            T* to = static_cast<T*>(p.y) + row * p.outputs + n;
            for (int64_t j = 0; j < outputs; j += kLanes<C>) {
                const int64_t here = std::min<int64_t>(kLanes<C>, outputs - j);
                Vector<C> sums = load(y.data + row * y.stride + j);
                if (p.bias != nullptr) sums += load(static_cast<const T*>(p.bias) + n + j, here);
                store(to + j, sums, here);
            }
        }
    }
}

}  // namespace

void linear_forward(const LinearParams& p) {
    if (p.rows == 0 || p.outputs == 0) return;
    // A task has whole vectors of outputs.
    const int64_t tasks = std::clamp<int64_t>(p.outputs * p.inputs / kElementsPerTask, 1, p.threads);
    const int64_t per_task = round_up(ceil_div(p.outputs, tasks), kOutputsTogether);
    with_type(static_cast<Dtype>(p.dtype), [&](auto type) {
        using T = typename decltype(type)::type;
        auto run = [&](auto order) {
            parallel_for(ceil_div(p.outputs, per_task), p.threads, [&](int64_t task) {
                forward_outputs<T, decltype(order)>(p, task * per_task,
                                                    std::min(p.outputs, (task + 1) * per_task));
            });
        };
        if constexpr (std::is_same_v<T, bfloat16>)
            if (p.inputs % (2 * kLanes<float>) == 0) return run(EvenThenOdd{});
        run(InOrder<T>{});
    });
}

}  // namespace lmkern
