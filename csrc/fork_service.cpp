#include "fork_service.hpp"

#include <cerrno>
#include <cstring>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

namespace thyme {
namespace {

union Control {
    char bytes[CMSG_SPACE(kMostDescriptors * sizeof(int))];
    cmsghdr align;
};

// Receives a message with its descriptors. False at the end of the socket.
bool receive(int socket, Birth& birth) {
    iovec content{birth.message, kMostMessageBytes};
    Control control;
    msghdr header{};
    header.msg_iov = &content;
    header.msg_iovlen = 1;
    header.msg_control = control.bytes;
    header.msg_controllen = sizeof control.bytes;
    ssize_t size;
    do {
        size = recvmsg(socket, &header, MSG_CMSG_CLOEXEC);
    } while (size < 0 && errno == EINTR);
    birth.size = size > 0 ? static_cast<std::size_t>(size) : 0;
    birth.num_descriptors = 0;
    for (cmsghdr* part = CMSG_FIRSTHDR(&header); part != nullptr; part = CMSG_NXTHDR(&header, part)) {
        if (part->cmsg_level == SOL_SOCKET && part->cmsg_type == SCM_RIGHTS) {
            birth.num_descriptors = static_cast<int>((part->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            std::memcpy(birth.descriptors, CMSG_DATA(part), part->cmsg_len - CMSG_LEN(0));
        }
    }
    return size > 0;
}

// Sends two ints, and a descriptor where it is not negative. False where nobody listens any more.
bool answer(int socket, int first, int second, int descriptor) {
    int numbers[2] = {first, second};
    iovec content{numbers, sizeof numbers};
    Control control{};
    msghdr header{};
    header.msg_iov = &content;
    header.msg_iovlen = 1;
    if (descriptor >= 0) {
        header.msg_control = control.bytes;
        header.msg_controllen = CMSG_SPACE(sizeof(int));
        cmsghdr* part = CMSG_FIRSTHDR(&header);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(sizeof(int));
        std::memcpy(CMSG_DATA(part), &descriptor, sizeof descriptor);
    }
    return sendmsg(socket, &header, MSG_NOSIGNAL) >= 0;
}

// Waits for a child that has ended.
bool reap(int socket, const Birth& birth) {
    int pid = 0, status = 0;
    rusage used{};
    std::memcpy(&pid, birth.message + 1, sizeof pid);
    while (wait4(pid, &status, 0, &used) < 0 && errno == EINTR) {
    }
    const long spent_us = (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1000000L + used.ru_utime.tv_usec + used.ru_stime.tv_usec;
    return answer(socket, status, static_cast<int>(spent_us / 1000), -1);
}

}  // namespace

void serve_forks(int socket, Birth& birth) {
    birth.is_child = false;
    while (receive(socket, birth)) {
        if (birth.message[0] == 'r') {
            if (!reap(socket, birth)) return;
            continue;
        }
        const pid_t pid = fork();
        if (pid == 0) {
            close(socket);
            birth.is_child = true;
            return;
        }
        int code = pid > 0 ? pid : -errno;
        const int pidfd = pid > 0 ? static_cast<int>(syscall(SYS_pidfd_open, pid, 0)) : -1;
        if (pid > 0 && pidfd < 0) code = -errno;  // the child is told nothing and leaves
        const bool heard = answer(socket, code, 0, pidfd);
        if (pidfd >= 0) close(pidfd);
        for (int i = 0; i < birth.num_descriptors; ++i) close(birth.descriptors[i]);
        if (!heard) return;
    }
}

}  // namespace thyme
