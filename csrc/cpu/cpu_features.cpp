// Reads from the machine what cpu_features.h describes.
#include "cpu_features.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace reformer {

Cpu this_cpu() {
  Cpu cpu;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (__get_cpuid(0, &a, &b, &c, &d)) {
    const unsigned words[3] = {b, d, c};
    std::memcpy(cpu.vendor, words, sizeof(words));
  }
  // __builtin_cpu_supports also asks whether the operating system saves the wider registers. Not every
  // Clang's knows the names of F16C and AVX512-BF16.
  __builtin_cpu_init();
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  constexpr unsigned kAvx512Bf16 = 1u << 5;  // in EAX of leaf 7, sub-leaf 1
  const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvx512Bf16);
  cpu.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  cpu.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  cpu.avx512bf16 = cpu.avx512 && bf16;
#endif
  return cpu;
}

}  // namespace reformer
