// What the Python module knows of the kernels of its instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lmkern {

struct EntryPoint {
    const char* name;
    size_t params_size;  // bytes of its params.hpp
    void (*kernel)(const char* packed);
};

struct EntryPoints {
    const EntryPoint* first;
    size_t count;
    int64_t served_types;  // bits 1 << Dtype
};

EntryPoints entry_points();

}  // namespace lmkern
