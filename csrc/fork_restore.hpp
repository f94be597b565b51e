// A process made the copy of another one that is jailed alike: its memory is put into a child that was forked from the
// same template, has a jail of its own, and has run nothing yet.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thyme {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kRestoreStack = 64 * 1024;
constexpr std::size_t kMostEntries = 4096;

// One step of a plan. Addresses and sizes are whole pages.
struct Step {
    std::uint64_t start, size;
    std::int64_t what;  // one of those below, or PROT_* that the pages get
};

constexpr std::int64_t kUnmap = -1;
constexpr std::int64_t kMap = -2;    // fresh pages, to read and write
constexpr std::int64_t kCopy = -3;   // what the original has here of its own, through its memory and its pagemap
constexpr std::int64_t kBreak = -4;  // the end of the heap is put to `start`
constexpr std::int64_t kGrow = -5;   // the stack reaches down to `start`

// What begins either half of a plan; behind it lie the steps. The first half says what can be copied of whichever
// original, so that it need not wait for the second, which says what that one has mapped otherwise.
struct Plan {
    std::uint64_t num_steps;
};

// The order to become a copy. The plan comes once the original holds still.
constexpr char kToBeCopy[8] = {'r', 'e', 's', 't', 'o', 'r', 'e', 0};

// Room that the copy works in: no step may touch it.
struct Workshop {
    alignas(16) char stack[kRestoreStack];
    std::uint64_t entries[kMostEntries];
};

// Where a copy gets what it needs from: the original's /proc/self/mem and /proc/self/pagemap, and the socket that the two
// halves of the plan come by, into a buffer of `size` bytes that no step touches.
struct Sources {
    int memory, pages, channel;
    char* buffer;
    std::size_t size;
};

// Follows the plan, and goes on where the original called `hold`. The three descriptors are closed before anything that the
// original could have written is run. Ends the process, with status 3, where a step fails or the plan does not come whole.
[[noreturn]] void become(Workshop& workshop, const Sources& sources);

enum class Held { kOriginal, kCopy, kLeft };

// Sends `ready` over `socket` and waits there for a word, while copies are made. Returns once in the original (kLeft where
// the other end is closed), and once in every copy, which then has the original's signal handlers.
Held hold(int socket, const char* ready, std::size_t size);

}  // namespace thyme
