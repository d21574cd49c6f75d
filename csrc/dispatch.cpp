// Chooses an instruction set once, at load, and forwards each kernel of kernels.h to that variant.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu/variants.h"

// CMake defines REFORMER_ISAS(VARIANT) as the compiled variants, best last: VARIANT(portable) VARIANT(avx2)
// ...
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
  bool automatic;  // chosen when the user asks for nothing
  bool (*supported)();
  KernelTable kernels;
};

// Each also asks whether the operating system saves the wider registers.
bool supports_portable() { return true; }
#if defined(__x86_64__)
// F16C and AVX512-BF16 are names that not every Clang's __builtin_cpu_supports knows.
[[maybe_unused]] bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
[[maybe_unused]] bool has_avx512bf16() {
  constexpr unsigned kBit = 1u << 5;  // of EAX, in sub-leaf 1 of leaf 7
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
// The 16-lane code compiled for AVX2: tests only.
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

const Variant* find(const char* name) {
  const Variant* found = nullptr;
  for (const Variant& variant : kVariants) {
    const bool wanted = *name ? std::strcmp(variant.name, name) == 0 : variant.automatic;
    if (wanted && variant.supported()) found = &variant;
  }
  return found;
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
  const Variant* found = find(name);
  if (found) active().store(found, std::memory_order_relaxed);
  return found != nullptr;
}

const char* compiled_isas() {
#define REFORMER_NAME(isa) " " #isa
  return &(REFORMER_ISAS(REFORMER_NAME))[1];
}

void* allocate_scratch(size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }

void free_scratch(void* memory) { ::operator delete(memory, std::align_val_t{64}); }

}  // namespace reformer
