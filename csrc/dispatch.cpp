// Chooses an instruction set when the library is loaded, and forwards each kernel of cpu/variants.h to the
// code compiled for it.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/variants.h"

// Written by CMake: REFORMER_ISAS(VARIANT) lists the compiled variants, the best last, as
// VARIANT(portable) VARIANT(avx2) ...
#include "isas.h"

namespace reformer {

#define REFORMER_DECLARE(result, name, parameters, arguments) result name parameters;
#define REFORMER_DECLARE_VARIANT(isa) \
  namespace isa {                     \
  REFORMER_KERNELS(REFORMER_DECLARE)  \
  }
REFORMER_ISAS(REFORMER_DECLARE_VARIANT)

namespace {

struct Variant {
  const char* name;
  bool automatic;  // may be chosen when the user names none
  bool (*supported)();
  KernelTable kernels;
};

// Whether the machine can run a variant. __builtin_cpu_supports also asks whether the operating system saves
// the wider registers.
bool supports_portable() { return true; }
#if defined(__x86_64__)
// Not every Clang's __builtin_cpu_supports knows the names of F16C and AVX512-BF16.
[[maybe_unused]] bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
[[maybe_unused]] bool has_avx512bf16() {
  constexpr unsigned kBit = 1u << 5;  // in EAX of leaf 7, sub-leaf 1
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBit);
}
[[maybe_unused]] bool supports_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
[[maybe_unused]] bool supports_avx512() {
  __builtin_cpu_init();
  return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool supports_avx512bf16() { return supports_avx512() && has_avx512bf16(); }
// For tests only: the 16-lane code, compiled for AVX2.
[[maybe_unused]] bool supports_wide() { return supports_avx2(); }
[[maybe_unused]] bool supports_wide_pairs() { return supports_avx2(); }
#endif

bool is_automatic(const char* name) { return std::strncmp(name, "wide", 4) != 0; }

#define REFORMER_ENTRY(result, name, parameters, arguments) &variant::name,
#define REFORMER_VARIANT(isa)                              \
  {#isa, is_automatic(#isa), &supports_##isa, [] {         \
     namespace variant = reformer::isa;                    \
     return KernelTable{REFORMER_KERNELS(REFORMER_ENTRY)}; \
   }()},
const Variant kVariants[] = {REFORMER_ISAS(REFORMER_VARIANT)};

// The variant called `name`, or the best automatic one for ""; null if the machine has no such variant.
const Variant* find(const char* name) {
  const Variant* best = nullptr;
  for (const Variant& variant : kVariants) {
    const bool wanted = *name ? std::strcmp(variant.name, name) == 0 : variant.automatic;
    if (wanted && variant.supported()) best = &variant;
  }
  return best;
}

std::atomic<const Variant*>& active() {
  static std::atomic<const Variant*> variant{find("")};
  return variant;
}

const KernelTable& kernels() { return active().load(std::memory_order_relaxed)->kernels; }

}  // namespace

#define REFORMER_FORWARD(result, name, parameters, arguments) \
  result name parameters { return kernels().name arguments; }
REFORMER_KERNELS(REFORMER_FORWARD)

const char* active_isa() { return active().load(std::memory_order_relaxed)->name; }

bool select_isa(const char* name) {
  const Variant* variant = find(name);
  if (variant) active().store(variant, std::memory_order_relaxed);
  return variant != nullptr;
}

const char* compiled_isas() {
#define REFORMER_NAME(isa) " " #isa
  return &(REFORMER_ISAS(REFORMER_NAME))[1];
}

void* allocate_scratch(size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }

void free_scratch(void* memory) { ::operator delete(memory, std::align_val_t{64}); }

}  // namespace reformer
