// Forks copies of the calling process for another one that asks over a socket.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thyme {

constexpr std::size_t kMostMessageBytes = 64 * 1024;
constexpr int kMostDescriptors = 5;

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
    std::int32_t early;            // whether the pages that will be written to are made ready before
    std::uint32_t before, after;   // bytes of both lists
    std::uint32_t unused;
};

struct Pages {
    std::uint64_t start, size;
};

// What the service and its children work with.
struct Service {
    bool is_child = false;  // false: the service has ended
    Message request, order;
    const Pages* pages = nullptr;  // that a child will write to
    std::size_t num_pages = 0;
    const char* note = nullptr;  // in the request
    std::size_t note_size = 0;
};

// Answers on `socket` (SOCK_SEQPACKET) until its other end is closed.
//
// A request is one byte, 'f' or 'r', and what belongs to it. 'f', a Birth and descriptors: forks. The answer, in the
// parent, is two ints, the id of the child or minus an errno and 0, with a pidfd of the child. 'r' and an int: waits
// for that child, which has ended. The answer is two ints, its wait status and the milliseconds of CPU time it took.
//
// A child makes its first calls with the descriptors of the request, waits for its order, makes the calls that come
// then with the descriptors of the order, and returns, with order and note. It ends, with status 3, where a call fails,
// and with 0 where no order comes. The parent returns at the end.
//
// The process must have one thread. It writes to nothing but `service`, its stack and the C library's own data: what
// lies in huge pages stays there, and a fork copies one entry for each.
void serve_forks(int socket, Service& service);

// Sends a byte with a descriptor. False where nobody listens any more.
bool send_descriptor(int socket, int descriptor);

}  // namespace thyme
