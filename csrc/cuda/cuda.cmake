# The CUDA backend, as YIVL_CUDA says; without one, a stub. Sets YIVL_CUDA_KIND (native, emulated or none),
# YIVL_CUDA_SOURCES and YIVL_CUDA_LIBRARIES.

set(YIVL_CUDA_OLDEST_TOOLKIT 12.4)

if(YIVL_CUDA STREQUAL "AUTO" OR YIVL_CUDA STREQUAL "ON")
  find_package(CUDAToolkit ${YIVL_CUDA_OLDEST_TOOLKIT} QUIET)
  if(CUDAToolkit_FOUND AND CUDAToolkit_NVCC_EXECUTABLE)
    set(YIVL_CUDA_KIND native)
  elseif(YIVL_CUDA STREQUAL "ON")
    message(FATAL_ERROR "YIVL_CUDA=ON: expected a CUDA toolkit ${YIVL_CUDA_OLDEST_TOOLKIT} or newer with nvcc, found none")
  else()
    set(YIVL_CUDA_KIND none)
  endif()
elseif(YIVL_CUDA STREQUAL "EMULATED")
  set(YIVL_CUDA_KIND emulated)
elseif(YIVL_CUDA STREQUAL "OFF")
  set(YIVL_CUDA_KIND none)
else()
  message(FATAL_ERROR "YIVL_CUDA: expected AUTO, ON, OFF or EMULATED, found ${YIVL_CUDA}")
endif()
message(STATUS "CUDA backend: ${YIVL_CUDA_KIND}")

file(GLOB YIVL_CUDA_KERNELS CONFIGURE_DEPENDS csrc/cuda/*.cu)
# What takes longest to compile goes first, or the other cores wait for it at the end.
list(REMOVE_ITEM YIVL_CUDA_KERNELS ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/matvec.cu)
list(INSERT YIVL_CUDA_KERNELS 0 ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/matvec.cu)
# What the CPU must find bit by bit (csrc/draw.h) is rounded after every operation, as there.
if(YIVL_CUDA_KIND STREQUAL "native")
  set_source_files_properties(csrc/cuda/draw.cu PROPERTIES COMPILE_OPTIONS -fmad=false)
endif()

# The .cu files among `sources` are compiled as C++ against the emulator. An index outside its array ends the kernel.
set(YIVL_EMULATOR ${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda_emulator)
function(yivl_emulate)
  set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX
    COMPILE_OPTIONS "-x;c++;-fsanitize=bounds-strict;-fno-sanitize-recover=bounds-strict" INCLUDE_DIRECTORIES ${YIVL_EMULATOR})
endfunction()

if(YIVL_CUDA_KIND STREQUAL "native")
  # 90 as PTX too, for cards of generations that have no code of their own here.
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real 90a-real 90-virtual)
    if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 120)
    endif()
  endif()
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
  enable_language(CUDA)
  # Four warps multiply at once in code for 9.0a alone, which neither 90 nor native means.
  if(CMAKE_CUDA_ARCHITECTURES STREQUAL "native")
    if(NOT CMAKE_CUDA_ARCHITECTURES_NATIVE MATCHES "^[0-9]")
      message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES=native: expected an NVIDIA GPU in this machine, found none")
    endif()
    set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
  endif()
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90(-real)?$" "90a\\1")
  if(CMAKE_CUDA_ARCHITECTURES MATCHES "90a")
    set_source_files_properties(csrc/cuda/runtime.cpp PROPERTIES COMPILE_DEFINITIONS YIVL_HAS_WARPGROUP_CODE)
  endif()
  add_compile_options($<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>)
  if(YIVL_WERROR)
    # A kernel that keeps registers in memory is slow: an error too. tests/report_spills.py says on which card.
    add_compile_options("$<$<COMPILE_LANGUAGE:CUDA>:--Werror=all-warnings;-Xcompiler=-Werror;-Xptxas=--warn-on-spills,-v>")
  endif()
  # By themselves, for a check that they compile.
  add_library(yivl_kernels OBJECT ${YIVL_CUDA_KERNELS})
  target_include_directories(yivl_kernels PRIVATE csrc)
  set(YIVL_CUDA_SOURCES $<TARGET_OBJECTS:yivl_kernels> csrc/cuda/ops_cuda.cpp csrc/cuda/profile.cpp csrc/cuda/runtime.cpp)
  set(YIVL_CUDA_LIBRARIES CUDA::cudart_static)
elseif(YIVL_CUDA_KIND STREQUAL "emulated")
  yivl_emulate(${YIVL_CUDA_KERNELS})
  set(YIVL_EMULATOR_SOURCES
      ${YIVL_EMULATOR}/cuda_emulator.cpp ${YIVL_EMULATOR}/emulated_runtime.cpp ${YIVL_EMULATOR}/tensor_core.cpp)
  set(YIVL_CUDA_SOURCES ${YIVL_CUDA_KERNELS} csrc/cuda/ops_cuda.cpp csrc/cuda/profile.cpp ${YIVL_EMULATOR_SOURCES})
  set_source_files_properties(${YIVL_EMULATOR_SOURCES} PROPERTIES INCLUDE_DIRECTORIES ${YIVL_EMULATOR})
else()
  set(YIVL_CUDA_SOURCES csrc/cuda/stub.cpp)
endif()
