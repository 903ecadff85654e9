// What the Python module knows of the kernels of its instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmkern {

struct EntryPoint {
    const char* name;
    size_t params_size;  // bytes of its params.hpp
    void (*kernel)(const char* packed);
    int64_t types;  // that it computes in, bits 1 << Dtype
};

struct EntryPoints {
    const EntryPoint* first;
    size_t count;
};

EntryPoints entry_points();

}  // namespace lmkern
