#include "fork_service.hpp"

#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fork_calls.hpp"

namespace thyme {
namespace {

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14
constexpr int kBroken = 3;          // exit status

union Control {
    char bytes[CMSG_SPACE(kMostDescriptors * sizeof(int))];
    cmsghdr align;
};

// Receives a message with its descriptors. False at the end of the socket.
bool receive(int socket, Message& message) {
    iovec content{message.bytes, kMostMessageBytes};
    Control control;
    msghdr header{};
    header.msg_iov = &content;
    header.msg_iovlen = 1;
    header.msg_control = control.bytes;
    header.msg_controllen = sizeof control.bytes;
    ssize_t size;
    do {
        size = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    } while (size < 0 && (errno == EINTR || errno == ECONNRESET));  // the latter once, where the peer left mail unread
    message.size = size > 0 ? static_cast<std::size_t>(size) : 0;
    message.num_descriptors = 0;
    for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
        if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS) {
            message.num_descriptors = static_cast<int>((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            std::memcpy(message.descriptors, CMSG_DATA(part), part->cmsg_len - CMSG_LEN(0));
        }
    }
    return size > 0;
}

// Sends bytes, and descriptors where there are any. False where nobody listens any more.
bool send(int socket, void* bytes, std::size_t size, const int* descriptors, int count) {
    iovec content{bytes, size};
    Control control{};
    msghdr header{};
    header.msg_iov = &content;
    header.msg_iovlen = 1;
    if (count > 0) {
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(count * sizeof(int));
        cmsghdr* part = CMSG_FIRSTHDR(&header);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(count * sizeof(int));
        std::memcpy(CMSG_DATA(part), descriptors, count * sizeof(int));
    }
    return sendmsg(socket, &header, MSG_NOSIGNAL) >= 0;
}

bool answer(int socket, int first, int second, int descriptor) {
    int numbers[2] = {first, second};
    return send(socket, numbers, sizeof numbers, &descriptor, descriptor >= 0);
}

// Waits for a child that has ended.
bool reap(int socket, const Message& request) {
    int pid = 0, status = 0;
    rusage used{};
    std::memcpy(&pid, request.bytes + 1, sizeof pid);
    while (wait4(pid, &status, 0, &used) < 0 && errno == EINTR) {
    }
    const long spent_us = (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000L + used.ru_utime.tv_usec + used.ru_stime.tv_usec;
    return answer(socket, status, static_cast<int>(spent_us / 1000), -1);
}

// Gets pages that will be needed.
void make_ready(const Pages* pages, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
        if (pages[i].size > 0) {
            madvise(reinterpret_cast<void*>(pages[i].start), pages[i].size, kPopulateWrite);
        } else {
            static_cast<void>(*reinterpret_cast<const volatile char*>(pages[i].start));
        }
    }
}

// Becomes the child whose memory came last with the order. The plan comes by `channel`.
[[noreturn]] void be_copied(Service& service, int keep, int channel) {
    const Message& order = service.order;
    if (order.num_descriptors < 2) _exit(kBroken);
    const int* const given = order.descriptors + order.num_descriptors - 2;
    if (given[0] <= keep + 1 || given[1] <= keep + 1 || channel <= keep + 2 || dup3(given[0], keep, O_CLOEXEC) < 0 ||
        dup3(given[1], keep + 1, O_CLOEXEC) < 0 || dup3(channel, keep + 2, O_CLOEXEC) < 0) {
        _exit(kBroken);
    }
    close_from(keep + 3);
    Message& plan = service.request;  // of no use any more
    become(service.workshop, {keep, keep + 1, keep + 2, plan.bytes, sizeof plan.bytes});
}

// What a child does up to its return.
void be_born(int socket, Service& service) {
    close(socket);
    Message& request = service.request;
    Birth birth;
    if (request.size < 1 + sizeof birth) _exit(kBroken);
    std::memcpy(&birth, request.bytes + 1, sizeof birth);
    char* const before = request.bytes + 1 + sizeof birth;
    char* const after = before + birth.before;
    char* const note = after + birth.after;
    if (note > request.bytes + request.size) _exit(kBroken);
    service.note = note;
    service.note_size = request.bytes + request.size - note;
    const Message& order = service.order;
    if (make_calls(before, birth.before, request.descriptors, request.num_descriptors, birth.parameter).failed >= 0) {
        _exit(kBroken);
    }
    if (birth.early) make_ready(service.pages, service.num_pages);
    if (!receive(birth.channel, service.order) || order.num_descriptors < birth.num_descriptors) _exit(0);
    const bool is_to_be_copy = order.size == sizeof kToBeCopy && std::memcmp(order.bytes, kToBeCopy, sizeof kToBeCopy) == 0;
    // The calls put something else in its place.
    const int channel = is_to_be_copy ? fcntl(birth.channel, F_DUPFD_CLOEXEC, static_cast<int>(birth.keep) + 3) : -1;
    if (make_calls(after, birth.after, order.descriptors, order.num_descriptors, birth.parameter).failed >= 0) {
        _exit(kBroken);
    }
    if (is_to_be_copy) be_copied(service, birth.keep, channel);
    close_from(birth.keep);
    service.is_child = true;
}

}  // namespace

bool send_descriptors(int socket, const int* descriptors, int count) {
    char byte = 0;
    return send(socket, &byte, 1, descriptors, count);
}

void serve_forks(int socket, Service& service) {
    const Message& request = service.request;
    service.is_child = false;
    while (receive(socket, service.request)) {
        if (request.bytes[0] == 'r') {
            if (!reap(socket, request)) return;
            continue;
        }
        if (request.bytes[0] == 'p') {
            const std::size_t sent = (request.size - 1) / sizeof(Pages);
            service.num_pages = sent < kMostPages ? sent : kMostPages;
            std::memcpy(service.pages, request.bytes + 1, service.num_pages * sizeof(Pages));
            continue;
        }
        const pid_t pid = fork();
        if (pid == 0) return be_born(socket, service);
        int code = pid > 0 ? pid : -errno;
        const int pidfd = pid > 0 ? static_cast<int>(syscall(SYS_pidfd_open, pid, 0)) : -1;
        if (pid > 0 && pidfd < 0) code = -errno;  // the child is told nothing and leaves
        const bool heard = answer(socket, code, 0, pidfd);
        if (pidfd >= 0) close(pidfd);
        for (int i = 0; i < request.num_descriptors; ++i) close(request.descriptors[i]);
        if (!heard) return;
    }
}

}  // namespace thyme
