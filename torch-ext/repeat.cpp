// The extension module of Python: latest_call(), the calls it returns, and nothing else. Python's
// limited API alone, as one binary serves every Python.
#include "repeat.h"

#include <Python.h>

#include <array>
#include <exception>
#include <memory>
#include <string>
#include <utility>

#include "registration.h"

namespace flashkda {
namespace {

constexpr char kCapsule[] = "flashkda.Repeat";

using Address = void*;

constexpr std::array<Address Addresses::*, 13> kOrder = {
    &Addresses::q,
    &Addresses::k,
    &Addresses::v,
    &Addresses::g,
    &Addresses::beta,
    &Addresses::A_log,
    &Addresses::dt_bias,
    &Addresses::initial_state,
    &Addresses::cu_seqlens,
    &Addresses::state_indices,
    &Addresses::num_accepted_tokens,
    &Addresses::o,
    &Addresses::final_state,
};

thread_local Repeat latest;

// Python's lock is given back while a call runs: a launch may wait for the GPU.
class WithoutLock {
 public:
  WithoutLock() : state_(PyEval_SaveThread()) {}
  ~WithoutLock() { PyEval_RestoreThread(state_); }
  WithoutLock(const WithoutLock&) = delete;
  WithoutLock& operator=(const WithoutLock&) = delete;

 private:
  PyThreadState* state_;
};

PyObject* fail(const char* what) {
  PyErr_SetString(PyExc_RuntimeError, what);
  return nullptr;
}

// x.data_ptr(): torch has no stable way from a Python tensor to its address but this.
bool address_of(PyObject* x, void** address) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* value = PyObject_CallMethodObjArgs(x, data_ptr, nullptr);
  if (value == nullptr) return false;
  *address = PyLong_AsVoidPtr(value);
  Py_DECREF(value);
  return *address != nullptr || PyErr_Occurred() == nullptr;
}

PyObject* call_again(PyObject* capsule, PyObject* tensors) {
  const auto* repeat = static_cast<const Repeat*>(PyCapsule_GetPointer(capsule, kCapsule));
  if (repeat == nullptr) return nullptr;
  const Py_ssize_t count = PyTuple_Size(tensors);
  if (count < 0) return nullptr;
  if (count > static_cast<Py_ssize_t>(kOrder.size())) return fail("flashkda: too many tensors");
  Addresses addresses;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* x = PyTuple_GetItem(tensors, i);
    if (x == Py_None) continue;
    if (!address_of(x, &(addresses.*kOrder[i]))) return nullptr;
  }
  std::string error;
  {
    WithoutLock unlocked;
    try {
      (*repeat)(addresses);
    } catch (const std::exception& e) {
      error = e.what();
    }
  }
  if (!error.empty()) return fail(error.c_str());
  Py_RETURN_NONE;
}

PyMethodDef kCallAgain = {"call_again", call_again, METH_VARARGS,
                          "Makes a call again; takes its tensors, None for absent ones."};

void forget(PyObject* capsule) {
  delete static_cast<Repeat*>(PyCapsule_GetPointer(capsule, kCapsule));
}

PyObject* latest_call(PyObject*, PyObject*) {
  if (!latest) Py_RETURN_NONE;
  auto repeat = std::make_unique<Repeat>(std::exchange(latest, nullptr));
  PyObject* capsule = PyCapsule_New(repeat.get(), kCapsule, forget);
  if (capsule == nullptr) return nullptr;
  repeat.release();
  PyObject* callable = PyCFunction_NewEx(&kCallAgain, capsule, nullptr);
  Py_DECREF(capsule);
  return callable;
}

PyMethodDef kMethods[] = {
    {"latest_call", latest_call, METH_NOARGS,
     "What this thread's latest op did, to be done again with other tensors; None without one."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void remember(Repeat repeat) { latest = std::move(repeat); }

}  // namespace flashkda

PyMODINIT_FUNC CONCAT(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               STRINGIFY(TORCH_EXTENSION_NAME),
                               nullptr,
                               0,
                               flashkda::kMethods,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
