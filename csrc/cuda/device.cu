// The CUDA runtime and the GPU architectures that this binary was built for.
#include "device.h"

#include <cuda_runtime_api.h>

namespace reformer::cuda {

int runtime_version() { return CUDART_VERSION; }

const char* architectures() { return REFORMER_CUDA_ARCHITECTURES; }

}  // namespace reformer::cuda
