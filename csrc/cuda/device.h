// What the CUDA part of the build was made for. Always declared, but defined only if the build has CUDA.
#pragma once

namespace reformer::cuda {

// The version of the CUDA runtime that the kernels were built with, as 1000 * major + 10 * minor.
int runtime_version();
// The GPU architectures that this binary has code for, as CMake names them: "80-real 90-real ...".
const char* architectures();

}  // namespace reformer::cuda
