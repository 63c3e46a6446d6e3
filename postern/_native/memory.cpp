// Advice to the operating system about memory that is about to be written for the first time.
#include <cstdint>

#include "export.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Asks for huge pages where [start, start + bytes) covers whole ones; a wish, without effect elsewhere than on Linux.
POSTERN_EXPORT void postern_expect_writes(void* start, std::int64_t bytes) {
#if defined(__linux__)
    constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
    const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(start) + page - 1) / page * page;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(start) + static_cast<std::uintptr_t>(bytes)) / page * page;
    if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
    (void)start;
    (void)bytes;
#endif
}
