// Whether Python's modules are what they were: their types, attributes, parameters and hooks.
//
// A snapshot is a tuple that Python owns, so that its garbage collector sees every reference; an
// object that is compared by identity cannot have been freed and replaced at its address meanwhile.
#include <pybind11/pybind11.h>

#include "register.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

// CPython's own mark of a type's methods and those of its bases, for its caches: every change gives
// a new one. 0 where it has none to give.
unsigned version_of_type(PyObject* object) {
  const PyTypeObject* const type = Py_TYPE(object);
  // A look-up makes CPython assign one.
  if (type->tp_version_tag == 0) static_cast<void>(PyObject_HasAttrString(object, "forward"));
  return type->tp_version_tag;
}

py::object attributes_of(PyObject* object) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!found) throw py::error_already_set();
  return found;
}

// Its keys and values in turn; of a value that is a dict or a list its contents too, else None.
py::tuple contents(PyObject* object, bool nested) {
  py::list all;
  const auto add = [&](PyObject* value) {
    all.append(py::handle(value));
    if (!nested) return;
    const bool container = PyDict_Check(value) || PyList_Check(value);
    all.append(container ? py::object(contents(value, false)) : py::none());
  };
  if (PyList_Check(object)) {
    for (const py::handle value : py::reinterpret_borrow<py::list>(object)) add(value.ptr());
    return py::tuple(all);
  }
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(object, &position, &key, &value);) {
    all.append(py::handle(key));
    add(value);
  }
  return py::tuple(all);
}

// Whether `object` still has these contents.
bool holds(PyObject* object, PyObject* expected, bool nested) {
  const Py_ssize_t count = PyTuple_GET_SIZE(expected);
  if (PyList_Check(object)) {
    if (PyList_GET_SIZE(object) != count) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      if (PyList_GET_ITEM(object, i) != PyTuple_GET_ITEM(expected, i)) return false;
    }
    return true;
  }
  const Py_ssize_t width = nested ? 3 : 2;
  if (PyDict_Size(object) * width != count) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t i = 0;
  for (Py_ssize_t position = 0; PyDict_Next(object, &position, &key, &value); i += width) {
    if (i >= count || key != PyTuple_GET_ITEM(expected, i) ||
        value != PyTuple_GET_ITEM(expected, i + 1)) {
      return false;
    }
    if (!nested) continue;
    PyObject* const inner = PyTuple_GET_ITEM(expected, i + 2);
    if (inner != Py_None && !holds(value, inner, false)) return false;
  }
  return true;
}

py::object snapshot(const py::list& modules) {
  py::list all;
  for (const py::handle module : modules) {
    const unsigned tag = version_of_type(module.ptr());
    if (tag == 0) return py::none();
    const py::object attributes = attributes_of(module.ptr());
    all.append(py::make_tuple(module, py::type::handle_of(module), tag, attributes,
                              contents(attributes.ptr(), true)));
  }
  return py::tuple(all);
}

// Fetches the containers among a module's attributes: between two forwards they leave the caches.
void fetch(PyObject* fields) {
  PyObject* const expected = PyTuple_GET_ITEM(fields, 4);
  for (Py_ssize_t i = 1; i + 1 < PyTuple_GET_SIZE(expected); i += 3) {
    if (PyTuple_GET_ITEM(expected, i + 1) != Py_None) {
      __builtin_prefetch(PyTuple_GET_ITEM(expected, i));
    }
  }
}

bool unchanged(const py::tuple& snapshot) {
  constexpr Py_ssize_t kAhead = 3;  // modules
  const Py_ssize_t count = PyTuple_GET_SIZE(snapshot.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch(PyTuple_GET_ITEM(snapshot.ptr(), i + kAhead));
    PyObject* const fields = PyTuple_GET_ITEM(snapshot.ptr(), i);
    PyObject* const module = PyTuple_GET_ITEM(fields, 0);
    PyTypeObject* const type = Py_TYPE(module);
    if (reinterpret_cast<PyObject*>(type) != PyTuple_GET_ITEM(fields, 1) ||
        type->tp_version_tag != PyLong_AsUnsignedLong(PyTuple_GET_ITEM(fields, 2))) {
      return false;
    }
    const py::object attributes = attributes_of(module);
    if (attributes.ptr() != PyTuple_GET_ITEM(fields, 3) ||
        !holds(attributes.ptr(), PyTuple_GET_ITEM(fields, 4), true)) {
      return false;
    }
  }
  return true;
}

}  // namespace

void register_snapshots(py::module_& module) {
  module.def("snapshot", &snapshot, "modules"_a,
             "What the modules are, for unchanged(): the types, attributes and, of those that are\n"
             "dicts or lists, their contents, by identity. None where it cannot be told.");
  module.def("unchanged", &unchanged, "snapshot"_a,
             "Whether every module still has the type, with the same methods, and the attributes\n"
             "that it had when snapshot() was called.");
}
