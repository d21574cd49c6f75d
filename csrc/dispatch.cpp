// Chooses an instruction set when the library is loaded, and forwards each kernel of cpu/variants.h to the
// code compiled for it.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/cpu_features.h"
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
  bool automatic;                       // may be chosen when the user names none
  const char* (*obstacle)(const Cpu&);  // why a CPU cannot run it; null if it can
  KernelTable kernels;
};

const char* obstacle_portable(const Cpu&) { return nullptr; }
[[maybe_unused]] const char* obstacle_avx2(const Cpu& cpu) {
  return cpu.avx2 ? nullptr : "the CPU lacks AVX2, FMA or F16C";
}
[[maybe_unused]] const char* obstacle_avx512(const Cpu& cpu) {
  return cpu.avx2 && cpu.avx512 ? nullptr : "the CPU lacks AVX-512 (F, BW, DQ and VL)";
}
[[maybe_unused]] const char* obstacle_avx512bf16(const Cpu& cpu) {
  if (const char* obstacle = obstacle_avx512(cpu)) return obstacle;
  return cpu.avx512bf16 ? nullptr : "the CPU lacks AVX512-BF16";
}
// For tests only: the 16-lane code, compiled for AVX2.
[[maybe_unused]] const char* obstacle_wide(const Cpu& cpu) { return obstacle_avx2(cpu); }
[[maybe_unused]] const char* obstacle_wide_pairs(const Cpu& cpu) { return obstacle_avx2(cpu); }

bool is_automatic(const char* name) { return std::strncmp(name, "wide", 4) != 0; }

// Why a variant that the CPU can run is not the one to choose; null if it is. The bfloat16 products of
// avx512bf16 are VDPBF16PS, which does 32 multiply-adds. On Sapphire Rapids it takes as long as four float32
// multiply-adds of 16 numbers, so bfloat16 widened to float32 is faster, by 1.2 to 1.35 times as measured.
// Emerald Rapids has the same cores, and no other CPU of Intel's is known to be better. On Zen 4 and Zen 5
// the pairs win.
const char* drawback(const Variant& variant, const Cpu& cpu) {
  if (std::strcmp(variant.name, "avx512bf16") != 0 || std::strcmp(cpu.vendor, "AuthenticAMD") == 0)
    return nullptr;
  if (std::strcmp(cpu.vendor, "GenuineIntel") == 0)
    return "on Intel's CPUs AVX512-BF16 is slower than bfloat16 widened to float32";
  return "AVX512-BF16 is known to be faster than bfloat16 widened to float32 on AMD's CPUs only";
}

#define REFORMER_ENTRY(result, name, parameters, arguments) &variant::name,
#define REFORMER_VARIANT(isa)                              \
  {#isa, is_automatic(#isa), &obstacle_##isa, [] {         \
     namespace variant = reformer::isa;                    \
     return KernelTable{REFORMER_KERNELS(REFORMER_ENTRY)}; \
   }()},
const Variant kVariants[] = {REFORMER_ISAS(REFORMER_VARIANT)};

struct Selection {
  const Variant* variant;
  const char* reason;
};

// The variant that is best for a CPU, and why no better one is.
Selection best_for(const Cpu& cpu) {
  Selection best{nullptr, nullptr};
  for (const Variant& variant : kVariants) {
    if (!variant.automatic) continue;
    const char* against = variant.obstacle(cpu);
    if (!against) against = drawback(variant, cpu);
    if (!against)
      best = Selection{&variant, nullptr};
    else if (!best.reason)
      best.reason = against;
  }
  if (!best.reason) best.reason = "the fastest of this build on this CPU";
  return best;
}

// Likewise the variant called `name`, or the best one for ""; no variant if the machine cannot run it.
Selection find(const char* name) {
  const Cpu cpu = this_cpu();
  if (!*name) return best_for(cpu);
  for (const Variant& variant : kVariants)
    if (std::strcmp(variant.name, name) == 0 && !variant.obstacle(cpu))
      return Selection{&variant, "asked for by name"};
  return Selection{nullptr, nullptr};
}

struct Active {
  std::atomic<const Variant*> variant;
  std::atomic<const char*> reason;
  explicit Active(const Selection& selection) : variant(selection.variant), reason(selection.reason) {}
};

Active& active() {
  static Active selected(find(""));
  return selected;
}

const KernelTable& kernels() { return active().variant.load(std::memory_order_relaxed)->kernels; }

}  // namespace

#define REFORMER_FORWARD(result, name, parameters, arguments) \
  result name parameters { return kernels().name arguments; }
REFORMER_KERNELS(REFORMER_FORWARD)

const char* active_isa() { return active().variant.load(std::memory_order_relaxed)->name; }

const char* active_isa_reason() { return active().reason.load(std::memory_order_relaxed); }

bool select_isa(const char* name) {
  const Selection selection = find(name);
  if (!selection.variant) return false;
  active().variant.store(selection.variant, std::memory_order_relaxed);
  active().reason.store(selection.reason, std::memory_order_relaxed);
  return true;
}

const char* best_isa(const Cpu& cpu, const char** reason) {
  const Selection selection = best_for(cpu);
  *reason = selection.reason;
  return selection.variant->name;
}

const char* compiled_isas() {
#define REFORMER_NAME(isa) " " #isa
  return &(REFORMER_ISAS(REFORMER_NAME))[1];
}

void* allocate_scratch(size_t bytes) { return ::operator new(bytes, std::align_val_t{64}); }

void free_scratch(void* memory) { ::operator delete(memory, std::align_val_t{64}); }

}  // namespace reformer
