#include "fork_restore.hpp"

#include <cerrno>
#include <csignal>
#include <cstring>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace thyme {
namespace {

constexpr int kBroken = 3;  // exit status
constexpr int kNumSignals = 65;
constexpr std::uint64_t kPresent = 1ULL << 63, kSwapped = 1ULL << 62, kOfAFile = 1ULL << 61, kOnlyHere = 1ULL << 56;

// Where the original stands. Copied like all else, so that a copy finds it.
struct {
    ucontext_t context;
    struct sigaction actions[kNumSignals];
    bool known[kNumSignals];
    stack_t signal_stack;
} held;
volatile int is_copy;

// A system call by nothing that lies in memory which can be written to: no table of addresses, no errno.
inline long call(long number, long a = 0, long b = 0, long c = 0, long d = 0, long e = 0, long f = 0) {
#if defined(__x86_64__)
    long result;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
#elif defined(__aarch64__)
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    register long x4 __asm__("x4") = e;
    register long x5 __asm__("x5") = f;
    __asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
#else
#error "no system calls for this processor"
#endif
}

inline bool copy(std::uint64_t start, std::uint64_t size, int memory) {
    while (size > 0) {
        const long done = call(SYS_pread64, memory, static_cast<long>(start), static_cast<long>(size), static_cast<long>(start));
        if (done <= 0) return false;
        start += done;
        size -= done;
    }
    return true;
}

inline bool copy_own(const Step& step, Workshop& workshop, int memory, int pages) {
    for (std::uint64_t start = step.start, end = step.start + step.size; start < end;) {
        std::uint64_t count = (end - start) / kPage;
        if (count > kMostEntries) count = kMostEntries;
        const long size = static_cast<long>(count * sizeof(std::uint64_t));
        if (call(SYS_pread64, pages, reinterpret_cast<long>(workshop.entries), size,
                 static_cast<long>(start / kPage * sizeof(std::uint64_t))) != size) {
            return false;
        }
        std::uint64_t first = 0, last = 0;  // of a run that is to be copied, last excluded
        for (std::uint64_t i = 0; i < count; ++i) {
            const std::uint64_t entry = workshop.entries[i];
            const bool own = (entry & kSwapped) || ((entry & kPresent) && (entry & kOnlyHere) && !(entry & kOfAFile));
            if (!own) continue;
            if (i != last && last > first && !copy(start + first * kPage, (last - first) * kPage, memory)) return false;
            if (i != last || last == first) first = i;
            last = i + 1;
        }
        if (last > first && !copy(start + first * kPage, (last - first) * kPage, memory)) return false;
        start += count * kPage;
    }
    return true;
}

inline bool follow(const Step& step, Workshop& workshop, int memory, int pages) {
    const long start = static_cast<long>(step.start), size = static_cast<long>(step.size);
    constexpr long rights = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    switch (step.what) {
        case kUnmap: return call(SYS_munmap, start, size) == 0;
        case kMap: return call(SYS_mmap, start, size, rights, flags, -1, 0) == start;
        case kCopy: return copy_own(step, workshop, memory, pages);
        case kBreak: return call(SYS_brk, start) == start;
        case kGrow: *reinterpret_cast<volatile char*>(start) = 0; return true;
        default: return call(SYS_mprotect, start, size, static_cast<long>(step.what)) == 0;
    }
}

inline bool follow_all(const char* plan, std::size_t size, Workshop& workshop, const Sources& sources) {
    if (size < sizeof(Plan)) return false;
    const std::uint64_t num_steps = reinterpret_cast<const Plan*>(plan)->num_steps;
    if (num_steps > (size - sizeof(Plan)) / sizeof(Step)) return false;
    const Step* const steps = reinterpret_cast<const Step*>(plan + sizeof(Plan));
    for (std::uint64_t i = 0; i < num_steps; ++i) {
        if (!follow(steps[i], workshop, sources.memory, sources.pages)) return false;
    }
    return true;
}

// What `become` needs on the other stack: there is no other way to hand it over.
struct {
    Workshop* workshop;
    Sources sources;
} task;

// Runs on the workshop's stack. Between the first step and the closing of the descriptors it depends on nothing but its
// own code, registers, plan and stack.
__attribute__((noinline, noreturn, optimize("no-stack-protector"))) void restore() {
    const auto [workshop, sources] = task;
    for (int half = 0; half < 2; ++half) {
        const long came = call(SYS_read, sources.channel, reinterpret_cast<long>(sources.buffer), static_cast<long>(sources.size));
        if (came <= 0 || !follow_all(sources.buffer, static_cast<std::size_t>(came), *workshop, sources)) {
            call(SYS_exit_group, kBroken);
        }
    }
    if (call(SYS_close, sources.memory) != 0 || call(SYS_close, sources.pages) != 0 || call(SYS_close, sources.channel) != 0) {
        call(SYS_exit_group, kBroken);
    }
    is_copy = 1;
    setcontext(&held.context);
    __builtin_trap();
}

// What is free need not be copied: each page costs a microsecond. What malloc got beyond its last block it keeps in whole
// huge pages, which are there to the end once one byte is written.
void free_what_is_free() {
#ifdef __GLIBC__
    malloc_trim(0);
#if __GLIBC_PREREQ(2, 33)
    const std::uint64_t end = reinterpret_cast<std::uint64_t>(sbrk(0)), size = mallinfo2().keepcost;
    if (size < kPage || size >= end) return;
    const std::uint64_t top = end - size;  // where the last block lies, unless somebody else has moved the end of the heap
    if (*reinterpret_cast<const std::uint64_t*>(top + sizeof(std::uint64_t)) != (size | 1)) return;
    const std::uint64_t first = (top / kPage + 1) * kPage;
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
#endif
#endif
}

}  // namespace

void become(Workshop& workshop, const Sources& sources) {
    ucontext_t other;
    if (getcontext(&other) != 0) _exit(kBroken);
    task = {&workshop, sources};
    other.uc_stack.ss_sp = workshop.stack;
    other.uc_stack.ss_size = sizeof workshop.stack;
    other.uc_link = nullptr;
    makecontext(&other, restore, 0);
    setcontext(&other);
    _exit(kBroken);
}

Held hold(int socket, const char* ready, std::size_t size) {
    for (int number = 1; number < kNumSignals; ++number) {
        held.known[number] = sigaction(number, nullptr, &held.actions[number]) == 0;
    }
    sigaltstack(nullptr, &held.signal_stack);
    free_what_is_free();
    is_copy = 0;
    getcontext(&held.context);
    if (is_copy) {
        for (int number = 1; number < kNumSignals; ++number) {
            if (held.known[number] && number != SIGKILL && number != SIGSTOP) sigaction(number, &held.actions[number], nullptr);
        }
        if (!(held.signal_stack.ss_flags & SS_ONSTACK)) sigaltstack(&held.signal_stack, nullptr);
        return Held::kCopy;
    }
    if (write(socket, ready, size) != static_cast<ssize_t>(size)) return Held::kLeft;
    char word[32];
    ssize_t heard;
    do {
        heard = read(socket, word, sizeof word);
    } while (heard < 0 && errno == EINTR);
    return heard > 0 ? Held::kOriginal : Held::kLeft;
}

}  // namespace thyme
