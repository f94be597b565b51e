#include "shared_pages.hpp"

#include <cerrno>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

namespace thyme {
namespace {

bool copy(int file, const Range& range, std::size_t offset) {
    std::size_t done = 0;
    while (done < range.size) {
        const void* from = reinterpret_cast<const void*>(range.start + done);
        const ssize_t written = pwrite(file, from, range.size - done, static_cast<off_t>(offset + done));
        if (written < 0 && errno == EINTR) continue;
        if (written <= 0) return false;
        done += static_cast<std::size_t>(written);
    }
    return true;
}

}  // namespace

std::size_t share_pages(const Range* ranges, std::size_t count) {
    const int writer = memfd_create("template", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (writer < 0) return 0;
    std::size_t total = 0;
    for (std::size_t i = 0; i < count; ++i) total += ranges[i].size;
    if (ftruncate(writer, static_cast<off_t>(total)) < 0) total = 0;
    // Neither loop writes to memory outside of the stack, so that no range changes after it was copied.
    std::size_t offset = 0;
    for (std::size_t i = 0; total > 0 && i < count; offset += ranges[i++].size) {
        if (!copy(writer, ranges[i], offset)) total = 0;
    }
    offset = 0;
    for (std::size_t i = 0; total > 0 && i < count; offset += ranges[i++].size) {
        mmap(reinterpret_cast<void*>(ranges[i].start), ranges[i].size, static_cast<int>(ranges[i].protection),
             MAP_PRIVATE | MAP_FIXED, writer, static_cast<off_t>(offset));
    }
    if (total > 0) fcntl(writer, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
    close(writer);
    return total;
}

}  // namespace thyme
