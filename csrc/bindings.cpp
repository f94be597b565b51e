// Python bindings only: check arguments, release the GIL, translate errors. The algorithms know nothing of Python.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_native, m) { m.doc() = "Thyme's C++ core."; }
