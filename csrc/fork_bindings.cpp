// thyme._fork: the fork service for Python, without pybind11, which would add a C++ runtime to every sandbox process.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cerrno>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "arena_region.hpp"
#include "fork_calls.hpp"
#include "fork_service.hpp"
#include "shared_pages.hpp"

namespace {

thyme::Service service;

PyObject* serve(PyObject*, PyObject* argument) {
    const long socket = PyLong_AsLong(argument);
    if (socket == -1 && PyErr_Occurred()) return nullptr;
    thyme::serve_forks(static_cast<int>(socket), service);
    if (!service.is_child) Py_RETURN_NONE;
    return Py_BuildValue("(y#y#)", service.note, static_cast<Py_ssize_t>(service.note_size), service.order.bytes,
                         static_cast<Py_ssize_t>(service.order.size));
}

PyObject* make_calls(PyObject*, PyObject* const* given, Py_ssize_t count) {
    if (count != 3 || !PyByteArray_Check(given[0]) || !PyTuple_Check(given[1])) {
        PyErr_SetString(PyExc_TypeError, "make_calls takes a bytearray, a tuple and an int");
        return nullptr;
    }
    int descriptors[thyme::kMostDescriptors];
    const Py_ssize_t num_descriptors = PyTuple_GET_SIZE(given[1]);
    if (num_descriptors > thyme::kMostDescriptors) {
        PyErr_SetString(PyExc_ValueError, "too many descriptors");
        return nullptr;
    }
    for (Py_ssize_t i = 0; i < num_descriptors; ++i) {
        descriptors[i] = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(given[1], i)));
    }
    const long parameter = PyLong_AsLong(given[2]);
    if (PyErr_Occurred()) return nullptr;
    const auto size = static_cast<std::size_t>(PyByteArray_GET_SIZE(given[0]));
    const thyme::Outcome outcome = thyme::make_calls(PyByteArray_AS_STRING(given[0]), size, descriptors,
                                                     static_cast<int>(num_descriptors), parameter);
    return Py_BuildValue("(ii)", outcome.failed, outcome.code);
}

// A system call: the number, and up to five arguments, each an int, an address in a bytes object, or None for 0. The
// result, or minus the errno.
PyObject* system_call(PyObject*, PyObject* const* given, Py_ssize_t count) {
    long values[6] = {0};
    if (count < 1 || count > 6) {
        PyErr_SetString(PyExc_TypeError, "system_call takes a number and up to five arguments");
        return nullptr;
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (PyBytes_Check(given[i])) {
            values[i] = reinterpret_cast<long>(PyBytes_AS_STRING(given[i]));
        } else if (given[i] != Py_None) {
            values[i] = PyLong_AsLong(given[i]);
            if (values[i] == -1 && PyErr_Occurred()) return nullptr;
        }
    }
    const long result = syscall(values[0], values[1], values[2], values[3], values[4], values[5]);
    return PyLong_FromLong(result < 0 ? -errno : result);
}

// (socket, ready): False in the process that called it, True in a copy of it, None where nobody is there any more.
PyObject* hold(PyObject*, PyObject* arguments) {
    int socket = 0;
    const char* ready = nullptr;
    Py_ssize_t size = 0;
    if (!PyArg_ParseTuple(arguments, "iy#", &socket, &ready, &size)) return nullptr;
    switch (thyme::hold(socket, ready, static_cast<std::size_t>(size))) {
        case thyme::Held::kOriginal: Py_RETURN_FALSE;
        case thyme::Held::kCopy: Py_RETURN_TRUE;
        default: Py_RETURN_NONE;
    }
}

PyObject* open_descriptors(PyObject*, PyObject* argument) {
    const long first = PyLong_AsLong(argument);
    if (first == -1 && PyErr_Occurred()) return nullptr;
    const long end = sysconf(_SC_OPEN_MAX), count = end > first ? end - first : 0;
    // All at once: a call for each of some hundreds takes a tenth of a millisecond.
    pollfd* const asked = PyMem_New(pollfd, count);
    if (asked == nullptr) return PyErr_NoMemory();
    for (long i = 0; i < count; ++i) asked[i] = {static_cast<int>(first + i), 0, 0};
    const bool known = poll(asked, static_cast<nfds_t>(count), 0) >= 0;
    PyObject* found = known ? PyList_New(0) : PyErr_SetFromErrno(PyExc_OSError);
    for (long i = 0; found != nullptr && i < count; ++i) {
        if (asked[i].revents & POLLNVAL) continue;
        PyObject* number = PyLong_FromLong(asked[i].fd);
        if (number == nullptr || PyList_Append(found, number) < 0) Py_CLEAR(found);
        Py_XDECREF(number);
    }
    PyMem_Free(asked);
    return found;
}

PyObject* gather_arenas(PyObject*, PyObject* argument) {
    const std::size_t size = PyLong_AsSize_t(argument);
    if (PyErr_Occurred()) return nullptr;
    if (!thyme::open_region(size)) return PyErr_NoMemory();
    PyObjectArenaAllocator allocator = {nullptr, thyme::allocate_arena, thyme::free_arena};
    PyObject_SetArenaAllocator(&allocator);
    Py_RETURN_NONE;
}

PyObject* close_region(PyObject*, PyObject*) {
    thyme::close_region();
    Py_RETURN_NONE;
}

PyObject* share_pages(PyObject*, PyObject* argument) {
    char* ranges = nullptr;
    Py_ssize_t size = 0;
    if (PyBytes_AsStringAndSize(argument, &ranges, &size) < 0) return nullptr;
    const auto count = static_cast<std::size_t>(size) / sizeof(thyme::Range);
    return PyLong_FromSize_t(thyme::share_pages(reinterpret_cast<const thyme::Range*>(ranges), count));
}

constexpr struct {
    const char* name;
    long number;
} kNumbers[] = {
    {"SYS_capget", SYS_capget},       {"SYS_capset", SYS_capset},         {"SYS_chdir", SYS_chdir},
    {"SYS_chroot", SYS_chroot},       {"SYS_close", SYS_close},           {"SYS_dup", SYS_dup},
    {"SYS_dup3", SYS_dup3},           {"SYS_fchownat", SYS_fchownat},     {"SYS_mkdirat", SYS_mkdirat},
    {"SYS_mount", SYS_mount},         {"SYS_openat", SYS_openat},         {"SYS_pivot_root", SYS_pivot_root},
    {"SYS_prctl", SYS_prctl},         {"SYS_prlimit64", SYS_prlimit64},   {"SYS_setgroups", SYS_setgroups},
    {"SYS_setns", SYS_setns},         {"SYS_setresgid", SYS_setresgid},   {"SYS_setresuid", SYS_setresuid},
    {"SYS_umask", SYS_umask},         {"SYS_umount2", SYS_umount2},       {"SYS_unshare", SYS_unshare},
    {"SYS_utimensat", SYS_utimensat}, {"SYS_write", SYS_write},
    {"MOST_CALLS", thyme::kMostCalls},
    {"MOST_PAGES_BYTES", thyme::kMostPages * sizeof(thyme::Pages)}, {"SEND_DESCRIPTORS", thyme::kSendDescriptors}, {"CLOSE_FROM", thyme::kCloseFrom},
};

PyMethodDef methods[] = {
    {"system_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(system_call)), METH_FASTCALL,
     "A system call: its number, and ints, bytes or None. Returns its result or minus the errno."},
    {"make_calls", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(make_calls)), METH_FASTCALL,
     "Makes a list of system calls: (-1, 0), or which failed and its errno."},
    {"serve", serve, METH_O,
     "Forks for whoever asks over a socket: (note, order) in a child that got one, None at its end."},
    {"hold", hold, METH_VARARGS,
     "Says it is ready over a socket and waits: False in the caller, True in each copy made of it meanwhile, None at the end."},
    {"open_descriptors", open_descriptors, METH_O, "The descriptors that are open, from one on."},
    {"gather_arenas", gather_arenas, METH_O, "Has the interpreter's next arenas lie side by side, up to so many bytes."},
    {"close_region", close_region, METH_NOARGS, "Gives back what is left of that; later arenas come from elsewhere."},
    {"share_pages", share_pages, METH_O, "Backs ranges of memory, packed as (start, size, protection), by a sealed file."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fork", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__fork() {
    PyObject* made = PyModule_Create(&module);
    for (const auto& [name, number] : kNumbers) {
        if (made != nullptr && PyModule_AddIntConstant(made, name, number) < 0) Py_CLEAR(made);
    }
    PyObject* place = Py_BuildValue("(kk)", reinterpret_cast<unsigned long>(&service), sizeof service);
    if (made != nullptr && (place == nullptr || PyModule_AddObject(made, "SERVICE", place) < 0)) Py_CLEAR(made);
    return made;
}
