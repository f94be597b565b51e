// The interpreter's arenas (blocks of small objects) side by side in one aligned piece of memory, in place of one
// mapping each wherever there is room: so that huge pages can back them.
#pragma once

#include <cstddef>

namespace thyme {

// Reserves `size` bytes (a multiple of 2 MiB), and has the C library's heap go on at a huge page. False where there is
// no address space.
bool open_region(std::size_t size);

// Gives back what was never used of the region; from now on arenas are those that were returned, or from elsewhere.
void close_region();

void* allocate_arena(void* context, std::size_t size);
void free_arena(void* context, void* address, std::size_t size);

}  // namespace thyme
