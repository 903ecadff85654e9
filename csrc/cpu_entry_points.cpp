// The entry points of one instruction set, each with a packed params.hpp as its argument.
#include "cpu_entry_points.hpp"

#include <cstring>

#include "activation/cpu.hpp"
#include "adamw/cpu.hpp"
#include "attention/cpu.hpp"
#include "cached_attention/cpu.hpp"
#include "copy/cpu.hpp"
#include "core/types.hpp"
#include "cross_entropy/cpu.hpp"
#include "embedding/cpu.hpp"
#include "linear/cpu.hpp"
#include "linear_cross_entropy/cpu.hpp"
#include "norm/cpu.hpp"
#include "rotary/cpu.hpp"

namespace lmkern {
namespace {

template <class Params, void (*kernel)(const Params&)>
constexpr EntryPoint entry(const char* name, int64_t types = kServedTypes) {
    return {name, sizeof(Params),
            [](const char* packed) {
                Params params;
                std::memcpy(&params, packed, sizeof params);
                kernel(params);
            },
            types};
}

constexpr EntryPoint kEntryPoints[] = {
    entry<AttentionParams, attention_backward>("attention_backward", kAttentionTypes),
    entry<AttentionParams, attention_forward>("attention_forward", kAttentionTypes),
#if defined(__AVX512BF16__)
    entry<LinearCrossEntropyParams, linear_input_gradient>("linear_input_gradient"),
    entry<LinearCrossEntropyParams, linear_logits>("linear_logits"),
    entry<LinearCrossEntropyParams, linear_weight_gradient_add>("linear_weight_gradient_add"),
    entry<LinearCrossEntropyParams, linear_weight_gradient_store>("linear_weight_gradient_store"),
#endif
// To these tiles add nothing.
#if !defined(__AMX_BF16__)
    entry<ActivationParams, activation_backward>("activation_backward"),
    entry<ActivationParams, activation_forward>("activation_forward"),
    entry<AdamwParams, adamw_step>("adamw_step"),
    entry<CopyParams, copy_forward>("copy_forward"),
    entry<CrossEntropyParams, cross_entropy_backward>("cross_entropy_backward"),
    entry<CrossEntropyParams, cross_entropy_forward>("cross_entropy_forward"),
    entry<NormParams, norm_backward>("norm_backward"),
    entry<NormParams, norm_forward>("norm_forward"),
    entry<RotaryParams, rotary_forward>("rotary_forward"),
#endif
// Nor does BF16 to what reads alone, or copies rows as they are.
#if !defined(__AVX512BF16__)
    entry<CachedAttentionParams, cached_attention_forward>("cached_attention_forward"),
    entry<EmbeddingParams, embedding_backward>("embedding_backward"),
    entry<EmbeddingParams, embedding_forward>("embedding_forward"),
    entry<LinearParams, linear_forward>("linear_forward"),
#endif
};

}  // namespace

EntryPoints entry_points() {
    return {kEntryPoints, sizeof kEntryPoints / sizeof kEntryPoints[0]};
}

}  // namespace lmkern
