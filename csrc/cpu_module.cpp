// The Python module of one instruction set: entry points only, each with a packed params.hpp as its argument.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "activation/cpu.hpp"
#include "adamw/cpu.hpp"
#include "attention/cpu.hpp"
#include "cached_attention/cpu.hpp"
#include "copy/cpu.hpp"
#include "core/workspace.hpp"
#include "cross_entropy/cpu.hpp"
#include "embedding/cpu.hpp"
#include "linear_cross_entropy/cpu.hpp"
#include "norm/cpu.hpp"
#include "rotary/cpu.hpp"
#include "simd/amx.hpp"

namespace py = pybind11;

namespace {

template <class Params, void (*kernel)(const Params&)>
void call(const py::bytes& packed) {
    const std::string_view bytes = packed;
    if (bytes.size() != sizeof(Params))
        throw py::value_error("lmkern: the packed call does not match the compiled module; rebuild it");
    Params params;
    std::memcpy(&params, bytes.data(), sizeof params);
    py::gil_scoped_release release;
    kernel(params);
}

// The instruction sets that a module may be compiled for and this processor runs, best first.
std::vector<std::string> supported_instruction_sets() {
    std::vector<std::string> names;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16") && lmkern::amx_usable()) names.push_back("amx");
    if (avx512) names.push_back("avx512");
    if (avx2) names.push_back("avx2");
#endif
    names.push_back("baseline");
    return names;
}

}  // namespace

PYBIND11_MODULE(LMKERN_MODULE_NAME, m) {
    using namespace lmkern;
    m.def("supported_instruction_sets", supported_instruction_sets);
    m.def("workspace_bytes", Workspace::bytes_of_all_threads);
    m.def("activation_backward", call<ActivationParams, activation_backward>);
    m.def("activation_forward", call<ActivationParams, activation_forward>);
    m.def("adamw_step", call<AdamwParams, adamw_step>);
    m.def("attention_backward", call<AttentionParams, attention_backward>);
    m.def("attention_forward", call<AttentionParams, attention_forward>);
    m.def("cached_attention_forward", call<CachedAttentionParams, cached_attention_forward>);
    m.def("copy_forward", call<CopyParams, copy_forward>);
    m.def("cross_entropy_backward", call<CrossEntropyParams, cross_entropy_backward>);
    m.def("cross_entropy_forward", call<CrossEntropyParams, cross_entropy_forward>);
    m.def("embedding_backward", call<EmbeddingParams, embedding_backward>);
    m.def("embedding_forward", call<EmbeddingParams, embedding_forward>);
    m.def("norm_backward", call<NormParams, norm_backward>);
    m.def("norm_forward", call<NormParams, norm_forward>);
    m.def("rotary_forward", call<RotaryParams, rotary_forward>);
#if defined(__AMX_BF16__)
    m.def("input_gradient", call<InputGradientParams, input_gradient>);
    m.def("weight_gradient_add", call<WeightGradientParams, weight_gradient_add>);
    m.def("weight_gradient_store", call<WeightGradientParams, weight_gradient_store>);
#endif
}
