// The kernels that are compiled once for each instruction set, and the table that dispatch.cpp calls.
//
// There is one source for all instruction sets: decode.cpp, rotations.cpp, hash.cpp, residual.cpp,
// attention/forward.cpp and attention/backward.cpp are each compiled as `portable`, `avx2`, `avx512` and
// `avx512bf16`, in a namespace of that name. What differs between them is the vector length, REFORMER_LANES,
// and the intrinsics in simd/. So the AVX-512 code of the backward pass is attention/backward.cpp with simd/,
// compiled with kLanes = 16; its object file is in kernels_avx512.dir of the build tree. CMakeLists.txt has
// each variant's compiler flags, dispatch.cpp the test whether a machine can run it.
//
// To add a kernel: declare it in kernels.h, write csrc/cpu/<kernel>.cpp inside REFORMER_ISA_NAMESPACE, add
// the file to REFORMER_KERNEL_SOURCES in CMakeLists.txt and one line to REFORMER_KERNELS below.
//
// These sources must not define any inline function or template with external linkage outside the variant's
// namespace, and so must not include a standard C++ header other than <cstddef>, <cstdint> and <cstring>. The
// linker keeps one copy of such a function for the whole library. If that is the AVX-512 one, the library
// crashes on a machine without AVX-512. python_tests/csrc/test_build.py checks the object files.
#pragma once

#include "../kernels.h"

// return type, name, parameters, arguments
#define REFORMER_KERNELS(KERNEL)                                                                           \
  KERNEL(void, sample_rotations, (const RotationParams& params), (params))                                 \
  KERNEL(void, lsh_hash, (const HashParams& params), (params))                                             \
  KERNEL(size_t, attention_forward_workspace_bytes, (const AttentionParams& params), (params))             \
  KERNEL(Status, attention_forward, (const AttentionParams& params), (params))                             \
  KERNEL(size_t, attention_backward_workspace_bytes, (const AttentionParams& params), (params))            \
  KERNEL(Status, attention_backward, (const AttentionParams& params, const AttentionGradients& gradients), \
         (params, gradients))                                                                              \
  KERNEL(Status, decode_step, (const DecodeParams& params), (params))                                      \
  KERNEL(void, residual_step, (const ResidualParams& params), (params))

namespace reformer {

struct KernelTable {
#define REFORMER_MEMBER(result, name, parameters, arguments) result(*name) parameters;
  REFORMER_KERNELS(REFORMER_MEMBER)
#undef REFORMER_MEMBER
};

// The instruction sets compiled into this library, best last, separated by spaces.
const char* compiled_isas();

// Scratch memory for kernels: 64-byte aligned; throws std::bad_alloc. Not inline, because of the rule above.
void* allocate_scratch(size_t bytes);
void free_scratch(void* memory);

}  // namespace reformer

// For each variant CMake defines REFORMER_ISA (portable, avx2, ...) and REFORMER_LANES, the number of floats
// in a vector.
#ifdef REFORMER_ISA
#define REFORMER_ISA_NAMESPACE reformer::REFORMER_ISA
#endif
