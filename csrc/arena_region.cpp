#include "arena_region.hpp"

#include <cstdint>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <sys/mman.h>
#include <unistd.h>

namespace thyme {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;
constexpr int kMostFree = 256;

char *first = nullptr, *next = nullptr, *end = nullptr;  // the region; what lies before `next` was given out
void* returned[kMostFree];  // given out and back
int num_returned = 0;
std::size_t returned_size = 0;  // of each of them

void* map(std::size_t size) {
    void* address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return address == MAP_FAILED ? nullptr : address;
}

char* rounded_up(char* address) {
    return reinterpret_cast<char*>((reinterpret_cast<std::uintptr_t>(address) + kHuge - 1) / kHuge * kHuge);
}

// Has the heap of the C library, which takes up where the program's data ends, go on at a huge page.
void align_heap() {
#ifdef __GLIBC__
    malloc_trim(0);  // what is left free at its end would be filled first
#endif
    char* top = static_cast<char*>(sbrk(0));
    sbrk(rounded_up(top) - top);
}

}  // namespace

bool open_region(std::size_t size) {
    align_heap();
    char* start = static_cast<char*>(map(size + kHuge));
    if (start == nullptr) return false;
    first = next = rounded_up(start);
    end = first + size;
    if (first > start) munmap(start, first - start);
    if (start + kHuge > first) munmap(end, start + kHuge - first);
    return true;
}

void close_region() {
    char* last = rounded_up(next);
    if (last < end) munmap(last, end - last);
    end = next;
}

void* allocate_arena(void*, std::size_t size) {
    if (num_returned > 0 && size == returned_size) return returned[--num_returned];
    if (size > static_cast<std::size_t>(end - next)) return map(size);
    void* address = next;
    next += size;
    return address;
}

void free_arena(void*, void* address, std::size_t size) {
    const bool inside = address >= first && address < end;
    if (inside && num_returned < kMostFree && (num_returned == 0 || size == returned_size)) {
        returned_size = size;
        returned[num_returned++] = address;
    } else {
        munmap(address, size);
    }
}

}  // namespace thyme
