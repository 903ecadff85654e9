// The Python module around the kernels, compiled once and linked into the module of every instruction set.
#include <pybind11/pybind11.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <string>
#include <string_view>

#include "core/parallel_for.hpp"
#include "core/types.hpp"
#include "core/workspace.hpp"
#include "cpu_entry_points.hpp"
#include "simd/amx.hpp"

namespace py = pybind11;

namespace {

void call(const lmkern::EntryPoint& entry, const py::bytes& packed) {
    const std::string_view bytes = packed;
    if (bytes.size() != entry.params_size)
        throw py::value_error("lmkern: the packed call does not match the compiled module; rebuild it");
    py::gil_scoped_release release;
    entry.kernel(bytes.data());
}

// The instruction sets that a module may be compiled for and this processor runs, best first.
py::tuple supported_instruction_sets() {
    py::list names;
#if defined(__x86_64__)
    // A hypervisor may hide F16C alone, and older compilers have no name for it here.
    unsigned a, b, features = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &features, &d) != 0 && (features & bit_F16C) != 0;
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
    if (bf16 && lmkern::amx_usable()) names.append("amx");
    if (bf16) names.append("avx512_bf16");
    if (avx512) names.append("avx512");
    if (avx2) names.append("avx2");
#endif
    names.append("baseline");
    return py::tuple(names);
}

void define(py::module_& m) {
    // Before anything forks: a module may be called for the first time in the child.
    lmkern::in_forked_child();
    const lmkern::EntryPoints entries = lmkern::entry_points();
    m.def("supported_instruction_sets", supported_instruction_sets);
    m.def("workspace_bytes", lmkern::Workspace::bytes_of_all_threads);
    for (const lmkern::EntryPoint* entry = entries.first; entry < entries.first + entries.count; ++entry)
        m.def(entry->name, [entry](const py::bytes& packed) { call(*entry, packed); });
    m.def("serves", [entries](const std::string& name, int64_t dtype) {
        for (const lmkern::EntryPoint* entry = entries.first; entry < entries.first + entries.count; ++entry)
            if (name == entry->name) return (entry->types >> dtype & 1) != 0;
        return false;
    });
}

}  // namespace

// Python calls the one that is named like the file.
PYBIND11_MODULE(_cpu_amx, m) {
    define(m);
}
PYBIND11_MODULE(_cpu_avx512_bf16, m) {
    define(m);
}
PYBIND11_MODULE(_cpu_avx512, m) {
    define(m);
}
PYBIND11_MODULE(_cpu_avx2, m) {
    define(m);
}
PYBIND11_MODULE(_cpu_baseline, m) {
    define(m);
}
