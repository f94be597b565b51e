// System calls as data: listed by one process, made by another one that is to write to as little memory as it can.
#pragma once

#include <cstddef>
#include <cstdint>

namespace thyme {

constexpr int kMostCalls = 512;
constexpr int kMostArguments = 5;

// What an argument is.
enum Kind : std::uint8_t {
    kNumber,      // the value itself
    kData,        // the address of what lies so many bytes into the data
    kResult,      // what the call of that number returned
    kDescriptor,  // the descriptor of that number among those that were given
    kParameter,   // the number that was given
};

struct Call {
    std::int64_t number;  // of the system call, or one of the two below
    std::int64_t arguments[kMostArguments];
    std::int32_t store;  // where in the data the result is put as an int; negative: nowhere
    std::uint8_t kinds[kMostArguments];
    std::uint8_t may_fail;
    std::uint8_t unused[6];
};

// In place of a system call: sends one to three descriptors, up to the first that is not above 0, over the socket that is
// the first argument.
constexpr std::int64_t kSendDescriptors = -1;
// In place of a system call: closes every descriptor from its argument on.
constexpr std::int64_t kCloseFrom = -2;

// Closes every descriptor from `first` on. Returns 0.
int close_from(int first);

// A list is an int64, the number of calls, then these, then the data, which the calls may change.
struct Outcome {
    int failed;  // the call that failed, -1 where none did
    int code;    // its errno
};

// Makes the calls of the list that lies in `size` bytes at `list`, one after the other, up to the first that fails.
// Writes to nothing but the list and its stack.
Outcome make_calls(char* list, std::size_t size, const int* descriptors, int num_descriptors, long parameter);

}  // namespace thyme
