# The CUDA module, included by CMakeLists.txt for LMKERN_MODULES=cuda.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(CMAKE_CUDA_COMPILER nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "lmkern: no nvcc found; put that of CUDA 11.8 or newer on the PATH, or name it in CUDACXX")
  endif()
endif()

# Machine code for compute capability 8 and 9.0, and PTX that the driver compiles for later ones. Set before the language is enabled: CMake's own choice may be one that the compiler has dropped.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)

pybind11_add_module(_cuda NO_EXTRAS
    csrc/cuda_module.cpp
    csrc/norm/cuda_forward.cu
    csrc/norm/cuda_backward.cu)

# Hopper's own instructions, which no other GPU and no later compiler takes.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.0)
  add_library(_cuda_hopper OBJECT csrc/attention/cuda_forward.cu csrc/attention/cuda_backward.cu)
  set_target_properties(_cuda_hopper PROPERTIES CUDA_ARCHITECTURES 90a-real POSITION_INDEPENDENT_CODE ON)
  target_compile_options(_cuda_hopper PRIVATE --expt-relaxed-constexpr)
  # A wait that lasts too long says for what, and ends the kernel.
  target_compile_definitions(_cuda_hopper PRIVATE $<$<CONFIG:Debug>:LMKERN_CUDA_DEBUG>)
  target_sources(_cuda PRIVATE $<TARGET_OBJECTS:_cuda_hopper>)
  target_compile_definitions(_cuda PRIVATE LMKERN_HOPPER)
endif()

foreach(target _cuda _cuda_hopper)
  if(TARGET ${target})
    target_include_directories(${target} PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O3 -Wall>
                                             $<$<COMPILE_LANGUAGE:CUDA>:-O3 -Xcompiler=-Wall --threads=2>)
  endif()
endforeach()
# The runtime's symbols stay inside: torch brings a CUDA runtime of its own, perhaps of another version, and neither may
# be bound to the other's functions.
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
install(TARGETS _cuda DESTINATION .)
