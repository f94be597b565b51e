// thyme._fork: the fork service for Python, without pybind11, which would add a C++ runtime to every sandbox process.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

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

PyMethodDef methods[] = {
    {"serve", serve, METH_O, "Forks for whoever asks over a socket: (message, descriptors) in a child, None at its end."},
    {"gather_arenas", gather_arenas, METH_O, "Has the interpreter's next arenas lie side by side, up to so many bytes."},
    {"close_region", close_region, METH_NOARGS, "Gives back what is left of that; later arenas come from elsewhere."},
    {"share_pages", share_pages, METH_O, "Backs ranges of memory, packed as (start, size, protection), by a sealed file."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_fork", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__fork() { return PyModule_Create(&module); }
