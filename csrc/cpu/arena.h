// A workspace that the caller allocated, handed out piece by piece.
#pragma once

#include "simd/vectors.h"

namespace reformer {
namespace REFORMER_ISA {

// Hands out 64-byte aligned parts of a workspace. Without a base it only counts the bytes, so that the same
// code both measures a workspace and lays it out.
struct Arena {
  char* base = nullptr;
  size_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    char* p = base ? base + used : nullptr;
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return reinterpret_cast<T*>(p);
  }
};

}  // namespace REFORMER_ISA
}  // namespace reformer
