// thyme._fork: the fork service for Python, without pybind11, which would add a C++ runtime to every sandbox process.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cerrno>
#include <sys/syscall.h>
#include <unistd.h>

#include "arena_region.hpp"
#include "fork_service.hpp"
#include "shared_pages.hpp"

namespace {

thyme::Birth birth;

PyObject* serve(PyObject*, PyObject* argument) {
    const long socket = PyLong_AsLong(argument);
    if (socket == -1 && PyErr_Occurred()) return nullptr;
    thyme::serve_forks(static_cast<int>(socket), birth);
    if (!birth.is_child) Py_RETURN_NONE;
    PyObject* descriptors = PyTuple_New(birth.num_descriptors);
    if (descriptors == nullptr) return nullptr;
    for (int i = 0; i < birth.num_descriptors; ++i) {
        PyTuple_SET_ITEM(descriptors, i, PyLong_FromLong(birth.descriptors[i]));
    }
    return Py_BuildValue("(y#N)", birth.message + 1, static_cast<Py_ssize_t>(birth.size - 1), descriptors);
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
    {"SYS_capget", SYS_capget}, {"SYS_capset", SYS_capset},   {"SYS_mount", SYS_mount},
    {"SYS_prctl", SYS_prctl},   {"SYS_setns", SYS_setns},     {"SYS_pivot_root", SYS_pivot_root},
    {"SYS_umount2", SYS_umount2}, {"SYS_unshare", SYS_unshare},
};

PyMethodDef methods[] = {
    {"system_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(system_call)), METH_FASTCALL,
     "A system call: its number, and ints, bytes or None. Returns its result or minus the errno."},
    {"serve", serve, METH_O, "Forks for whoever asks over a socket: (message, descriptors) in a child, None at its end."},
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
    return made;
}
