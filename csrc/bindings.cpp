// Python bindings only: check arguments, release the GIL, translate errors. The algorithms know nothing of Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "repetition.hpp"

namespace py = pybind11;

namespace {

// Borrowed as they are: a conversion here would hide a copy or wrap a wide integer.
using Int32Array = py::array_t<int32_t, py::array::c_style>;

// (rule, index, start, period, copies)
using Hit = std::tuple<const char*, uint32_t, uint32_t, uint32_t, uint32_t>;

// The detector behind a lock, since push lets other Python threads run.
template <int HashBits>
class LockedDetector {
  public:
    LockedDetector(uint32_t window, double ratio, uint32_t min_tokens, uint32_t min_tail_tokens,
                   std::vector<uint32_t> copies, uint32_t capacity)
        : detector_({window, ratio, min_tokens, min_tail_tokens, std::move(copies)}, capacity) {}

    uint32_t open() {
        const std::lock_guard lock(mutex_);
        return detector_.open();
    }
    uint32_t fork(int64_t slot) {
        const std::lock_guard lock(mutex_);
        return detector_.fork(slot);
    }
    void close(int64_t slot) {
        const std::lock_guard lock(mutex_);
        detector_.close(slot);
    }
    void restart(int64_t slot) {
        const std::lock_guard lock(mutex_);
        detector_.restart(slot);
    }
    std::optional<Hit> hit(int64_t slot) {
        const std::lock_guard lock(mutex_);
        const thyme::RepetitionHit* hit = detector_.hit(slot);
        if (hit == nullptr) return std::nullopt;
        const char* rule = hit->rule == thyme::RepetitionRule::kTail ? "tail" : "substring";
        return Hit{rule, hit->index, hit->start, hit->period, hit->copies};
    }
    py::array_t<uint8_t> push(const Int32Array& slots, const Int32Array& tokens) {
        if (slots.ndim() != 1 || tokens.ndim() != 1 || slots.size() != tokens.size())
            throw std::invalid_argument("slots and tokens must be one-dimensional and equally long");
        py::array_t<uint8_t> flags(slots.size());
        const int32_t* slot_data = slots.data();
        const int32_t* token_data = tokens.data();
        uint8_t* flag_data = flags.mutable_data();
        const auto count = static_cast<size_t>(slots.size());
        {
            const py::gil_scoped_release released;
            const std::lock_guard lock(mutex_);
            detector_.push(slot_data, token_data, flag_data, count);
        }
        return flags;
    }

  private:
    std::mutex mutex_;
    thyme::RepetitionDetector<HashBits> detector_;
};

template <int HashBits>
void bind_detector(py::module_& m, const char* name) {
    using Detector = LockedDetector<HashBits>;
    py::class_<Detector>(m, name)
        .def(py::init<uint32_t, double, uint32_t, uint32_t, std::vector<uint32_t>, uint32_t>(), py::kw_only(),
             py::arg("window"), py::arg("ratio"), py::arg("min_tokens"), py::arg("min_tail_tokens"), py::arg("copies"),
             py::arg("capacity"))
        .def("open", &Detector::open)
        .def("fork", &Detector::fork, py::arg("slot"))
        .def("close", &Detector::close, py::arg("slot"))
        .def("restart", &Detector::restart, py::arg("slot"))
        .def("hit", &Detector::hit, py::arg("slot"))
        .def("push", &Detector::push, py::arg("slots").noconvert(), py::arg("tokens").noconvert());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Thyme's C++ core.";
    bind_detector<61>(m, "RepetitionDetector");
    // Hashes modulo 7: nearly every lookup collides, which proves in tests that the comparison of tokens keeps it exact.
    bind_detector<3>(m, "_CollidingRepetitionDetector");
}
