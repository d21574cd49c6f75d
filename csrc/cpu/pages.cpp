// Large pages for large arrays. The kernels gather rows in sorted order, so with 4 KiB pages most rows miss
// the translation buffer, and a fresh array costs a page fault for each page.
#include "../kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace reformer {

void prefer_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) & -kHugePage, end = (address + bytes) & -kHugePage;
  // It is advice: where the system has no huge pages, the call fails and nothing changes.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace reformer
