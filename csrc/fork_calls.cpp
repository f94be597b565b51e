#include "fork_calls.hpp"

#include <cerrno>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

#include "fork_service.hpp"

namespace thyme {
namespace {

constexpr int kMostOpen = 1 << 16;

}  // namespace

int close_from(int first) {
    if (syscall(SYS_close_range, first, ~0U, 0) != 0) {  // before Linux 5.9
        for (int descriptor = first; descriptor < kMostOpen; ++descriptor) close(descriptor);
    }
    return 0;
}

Outcome make_calls(char* list, std::size_t size, const int* descriptors, int num_descriptors, long parameter) {
    std::int64_t count = 0;
    if (size < sizeof count) return {0, EINVAL};
    std::memcpy(&count, list, sizeof count);
    if (count < 0 || count > kMostCalls || size < sizeof count + count * sizeof(Call)) return {0, EINVAL};
    char* const data = list + sizeof count + count * sizeof(Call);
    const auto data_size = static_cast<std::int64_t>(size - (data - list));
    long results[kMostCalls];
    for (int i = 0; i < count; ++i) {
        Call call;
        std::memcpy(&call, list + sizeof count + i * sizeof(Call), sizeof call);
        long values[kMostArguments];
        for (int k = 0; k < kMostArguments; ++k) {
            const std::int64_t given = call.arguments[k];
            switch (call.kinds[k]) {
                case kNumber: values[k] = given; break;
                case kParameter: values[k] = parameter; break;
                case kData:
                    if (given < 0 || given >= data_size) return {i, EINVAL};
                    values[k] = reinterpret_cast<long>(data + given);
                    break;
                case kResult:
                    if (given < 0 || given >= i) return {i, EINVAL};
                    values[k] = results[given];
                    break;
                case kDescriptor:
                    if (given < 0 || given >= num_descriptors) return {i, EINVAL};
                    values[k] = descriptors[given];
                    break;
                default: return {i, EINVAL};
            }
        }
        if (call.number == kSendDescriptors) {
            const int sent[] = {static_cast<int>(values[1]), static_cast<int>(values[2]), static_cast<int>(values[3])};
            int count = 0;
            while (count < 3 && sent[count] > 0) ++count;
            results[i] = send_descriptors(static_cast<int>(values[0]), sent, count) ? 0 : -1;
        } else if (call.number == kCloseFrom) {
            results[i] = close_from(static_cast<int>(values[0]));
        } else {
            results[i] = syscall(call.number, values[0], values[1], values[2], values[3], values[4]);
        }
        if (results[i] < 0 && !call.may_fail) return {i, errno};
        if (call.store >= 0) {
            const int result = static_cast<int>(results[i]);
            if (call.store + static_cast<std::int64_t>(sizeof result) > data_size) return {i, EINVAL};
            std::memcpy(data + call.store, &result, sizeof result);
        }
    }
    return {-1, 0};
}

}  // namespace thyme
