// What the CUDA part of the build offers. Declared always, defined only where it was compiled.
#pragma once

namespace reformer::cuda {

// The CUDA runtime that the kernels were built against, as 1000 * major + 10 * minor.
int runtime_version();
// GPU architectures with machine code in this binary, as CMake names them: "80-real 90-real ...".
const char* architectures();

}  // namespace reformer::cuda
