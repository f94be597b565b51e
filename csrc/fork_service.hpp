// Forks copies of the calling process for another one that asks over a socket.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fork_restore.hpp"

namespace thyme {

constexpr std::size_t kMostMessageBytes = 256 * 1024;
constexpr int kMostDescriptors = 7;
constexpr std::size_t kMostPages = 2048;

struct Message {
    char bytes[kMostMessageBytes];
    std::size_t size = 0;
    int descriptors[kMostDescriptors];
    int num_descriptors = 0;
};

// What begins a request to fork. Behind it lie the calls before the order, those after it, and the note.
struct Birth {
    std::int64_t parameter;        // of the calls
    std::int32_t channel;          // the descriptor that the order comes by, once the first calls are made
    std::int32_t num_descriptors;  // that an order has, or more; what comes with fewer is none
    std::int32_t early;            // whether the pages that it will need are made ready before
    std::uint32_t before, after;   // bytes of both lists
    std::uint32_t keep;  // descriptors from here on are closed behind the second list
};

// Pages that a child will write to; of size 0: one that it will read.
struct Pages {
    std::uint64_t start, size;
};

// What the service and its children work with.
struct alignas(kPage) Service {
    bool is_child = false;  // false: the service has ended
    Message request, order;
    Pages pages[kMostPages];
    std::size_t num_pages = 0;
    const char* note = nullptr;  // in the request
    std::size_t note_size = 0;
    Workshop workshop;
};

// Answers on `socket` (SOCK_SEQPACKET) until its other end is closed.
//
// A request is one byte, 'f', 'p' or 'r', and what belongs to it. 'f', a Birth and descriptors: forks. The answer, in the
// parent, is two ints, the id of the child or minus an errno and 0, with a pidfd of the child. 'p' and Pages: what
// children that are early make ready; no answer. 'r' and an int: waits
// for that child, which has ended. The answer is two ints, its wait status and the milliseconds of CPU time it took.
//
// A child makes its first calls with the descriptors of the request, waits for its order, makes the calls that come
// then with the descriptors of the order, and returns, with order and note. It ends, with status 3, where a call fails,
// and with 0 where no order comes. Where the order is kToBeCopy, whose last two descriptors are the memory and the pagemap of
// another child, it becomes a copy of that one instead, once both halves of the plan have come. The parent
// returns at the end.
//
// The process must have one thread. It writes to nothing but `service`, its stack and the C library's own data: what
// lies in huge pages stays there, and a fork copies one entry for each.
void serve_forks(int socket, Service& service);

// Sends a byte with descriptors. False where nobody listens any more.
bool send_descriptors(int socket, const int* descriptors, int count);

}  // namespace thyme
