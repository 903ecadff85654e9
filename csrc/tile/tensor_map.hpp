// What the copy engine must know of a tensor, made on the host. The driver's entry point comes from the CUDA
// runtime, so that nothing is linked against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lmkern {

// Boxes of `rows` rows and 64 columns of a tensor (batch, head, row, column) of 16-bit elements: its sizes
// and its strides in elements, that of the columns 1. Start and strides are multiples of 16 bytes. What lies
// beyond the tensor is read as zero. Throws std::runtime_error where the driver refuses.
inline CUtensorMap tensor_map(const void* start, const int64_t (&sizes)[4], const int64_t (&strides)[3],
                              int rows) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                    12000, cudaEnableDefault, &found);
#else
        const cudaError_t status =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        if (status != cudaSuccess || found != cudaDriverEntryPointSuccess)
            throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it needs CUDA 12.0");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    CUtensorMap map;
    // Of a dimension of size 1 the stride may be anything, and the driver refuses some.
    cuuint64_t size[4], stride[3];
    for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(sizes[3 - i]);
    for (int i = 0; i < 3; ++i)
        stride[i] = size[i + 1] == 1 ? 16 : static_cast<cuuint64_t>(strides[2 - i]) * 2;
    const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, step[4] = {1, 1, 1, 1};
    const CUresult status =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(start), size, stride, box, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::runtime_error("the CUDA driver refused a tensor map: CUresult " + std::to_string(status));
    return map;
}

}  // namespace lmkern
