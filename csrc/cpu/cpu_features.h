// What the choice of an instruction set depends on, apart from the machine that it is read from, so that
// tests can ask what would be chosen on another.
#pragma once

namespace reformer {

// A feature counts only if the operating system saves its registers too.
struct Cpu {
  char vendor[13] = "";  // as CPUID spells it: GenuineIntel, AuthenticAMD, ...; empty on other architectures
  bool avx2 = false;     // with FMA and F16C
  bool avx512 = false;   // F, BW, DQ and VL
  bool avx512bf16 = false;
};

Cpu this_cpu();

// The name of the variant that is chosen for a CPU when the user names none, and why no better one is.
const char* best_isa(const Cpu& cpu, const char** reason);

}  // namespace reformer
