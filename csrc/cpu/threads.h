// The calling thread's index in its OpenMP team; 0 if the compiler has no OpenMP.
#pragma once

#include "simd/vectors.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace reformer {
namespace REFORMER_ISA {

REFORMER_INLINE int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace REFORMER_ISA
}  // namespace reformer
