// The Python module of the CUDA kernels: entry points only. Each takes one packed buffer that mirrors a
// params.hpp.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <string_view>

#include "attention/cuda.hpp"
#include "layer_norm/cuda.hpp"

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

// 1000 * major + 10 * minor of the CUDA runtime inside this module.
int runtime_version() {
    return CUDART_VERSION;
}

// Likewise the newest that the machine's driver takes; 0 without a driver.
int driver_version() {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    using namespace lmkern;
    m.def("runtime_version", runtime_version);
    m.def("driver_version", driver_version);
#ifdef LMKERN_HOPPER
    m.def("attention_forward", call<CudaAttentionParams, cuda::attention_forward>);
    m.def("attention_backward", call<CudaAttentionParams, cuda::attention_backward>);
#endif
    m.def("layer_norm_forward", call<LayerNormParams, cuda::layer_norm_forward>);
    m.def("layer_norm_backward", call<LayerNormParams, cuda::layer_norm_backward>);
}
