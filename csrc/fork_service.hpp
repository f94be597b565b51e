// Forks copies of the calling process for another one that asks over a socket.
#pragma once

#include <cstddef>

namespace thyme {

constexpr std::size_t kMostMessageBytes = 16384;
constexpr int kMostDescriptors = 4;

// What a copy was asked to be.
struct Birth {
    bool is_child = false;  // false: the service has ended
    char message[kMostMessageBytes];
    std::size_t size = 0;
    int descriptors[kMostDescriptors];
    int num_descriptors = 0;
};

// Answers on `socket` (SOCK_SEQPACKET) until its other end is closed.
//
// A request is one byte, 'f' or 'r', and what belongs to it. 'f', a message and descriptors: forks. The answer, in the
// parent, is two ints, the id of the child or minus an errno and 0, with a pidfd of the child. 'r' and an int: waits
// for that child, which has ended. The answer is two ints, its wait status and the milliseconds of CPU time it took.
//
// Returns in every child, which owns the descriptors that came with its request, and once in the parent, at the end.
// The process must have one thread. The parent writes to nothing but its stack and the C library's own data: what lies
// in huge pages stays there, and a fork copies one entry for each.
void serve_forks(int socket, Birth& birth);

}  // namespace thyme
