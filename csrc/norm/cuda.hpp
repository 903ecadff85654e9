// The norms on NVIDIA GPUs. Contracts: lmkern/kernels/{layer_norm,rms_norm,add_norm}/__init__.py. Both
// enqueue on the stream and return; std::runtime_error, with the shapes, when the GPU refuses the launch.
#pragma once

#include <cstdint>

#include "norm/params.hpp"

namespace lmkern {

// What a call passes beside NormParams, filled by lmkern/kernels/norm_cuda.py.
struct CudaNormParams {
    NormParams norm;
    int64_t device, stream;
};

namespace cuda {

// Reads x, residual, weight, bias; writes y, mean, rstd, and h where there is a residual.
void norm_forward(const CudaNormParams& p);

// Reads h, weight, mean, rstd, dy, dh; writes those of dx, dresidual, dweight and dbias that are not null,
// the latter two through partials.
void norm_backward(const CudaNormParams& p);

}  // namespace cuda
}  // namespace lmkern
