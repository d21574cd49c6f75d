// The kernels that exist once per instruction set, and the table through which dispatch.cpp calls them.
//
// To add a kernel: declare it in kernels.h, write csrc/cpu/<kernel>.cpp inside REFORMER_ISA_NAMESPACE, add
// the file to REFORMER_KERNEL_SOURCES in CMakeLists.txt and one line to REFORMER_KERNELS below.
//
// One rule for the sources compiled per instruction set: no inline function or template with external
// linkage outside the variant's namespace, so no standard C++ header beyond <cstddef>, <cstdint> and
// <cstring>. The linker keeps one copy of such a function for the whole library, perhaps the AVX-512 one, and
// a machine without AVX-512 would then run it. python_tests/test_build.py reads the object files.
#pragma once

#include "../kernels.h"

// return type, name, parameters, arguments
#define REFORMER_KERNELS(KERNEL)                                                                           \
  KERNEL(void, lsh_hash, (const HashParams& params), (params))                                             \
  KERNEL(size_t, attention_forward_workspace_bytes, (const AttentionParams& params), (params))             \
  KERNEL(Status, attention_forward, (const AttentionParams& params), (params))                             \
  KERNEL(size_t, attention_backward_workspace_bytes, (const AttentionParams& params), (params))            \
  KERNEL(Status, attention_backward, (const AttentionParams& params, const AttentionGradients& gradients), \
         (params, gradients))                                                                              \
  KERNEL(void, residual_step, (const ResidualParams& params), (params))

namespace reformer {

struct KernelTable {
#define REFORMER_MEMBER(result, name, parameters, arguments) result(*name) parameters;
  REFORMER_KERNELS(REFORMER_MEMBER)
#undef REFORMER_MEMBER
};

// The instruction sets compiled into this library, best last, separated by spaces.
const char* compiled_isas();

// Scratch memory for kernels: 64-byte aligned, throws std::bad_alloc. Out of line, for the rule above.
void* allocate_scratch(size_t bytes);
void free_scratch(void* memory);

}  // namespace reformer

// CMake defines REFORMER_ISA (portable, avx2, ...) and REFORMER_LANES, the floats in a vector, for each
// variant.
#ifdef REFORMER_ISA
#define REFORMER_ISA_NAMESPACE reformer::REFORMER_ISA
#endif
