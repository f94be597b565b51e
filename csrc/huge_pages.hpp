// A hint to the kernel, where it knows one: memory about to be written for the first time may come in pages of 2 MiB.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace thyme {

// A fresh page of 4 KiB costs a trap, in a virtual machine microseconds: for a result of many MiB that is more than the kernel
// that fills it. numpy asks the same for its large arrays; what is mapped already stays as it is.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
    constexpr size_t kWorthwhile = size_t{2} << 20, kPage = 4096;
    if (bytes < kWorthwhile) return;
    const auto begin = reinterpret_cast<uintptr_t>(data), first = (begin + kPage - 1) / kPage * kPage;
    const uintptr_t last = (begin + bytes) / kPage * kPage;
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace thyme
