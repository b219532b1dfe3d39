// Tensors as Python holds them, read without PyTorch's headers: by the C functions of DLPack 1 (dmlc.github.io/dlpack),
// which torch.Tensor offers from PyTorch 2.10 on. They are for calls so short that reading tensors in Python takes
// longer than the kernel. Such a call takes its arguments as they came and returns None wherever one of them is not
// exactly as the kernel wants it; Python then goes the long way, which converts, or says what is wrong.
#pragma once

#include <cstring>
#include <initializer_list>

#include "bindings/common.h"

namespace pyrepr {

// DLTensor of DLPack: the same fields in the same order. Strides and sizes count elements.
struct Tensor {
  void* data;
  int32_t device_type, device_id, dims;
  uint8_t kind, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;
  uint64_t offset;

  // As Python numbers dtypes (`TABLE_CODES` in pyrepr/ops/lookup.py), −1 for all others.
  int code() const {
    constexpr int kInt = 0, kFloat = 2, kBfloat = 4;
    if (lanes != 1) return -1;
    if (kind == kFloat) return bits == 32 ? 0 : bits == 64 ? 1 : bits == 16 ? 3 : -1;
    return kind == kBfloat && bits == 16 ? 2 : kind == kInt && bits == 8 ? 4 : -1;
  }
  bool is(DType dtype) const { return code() == static_cast<int>(dtype); }
  bool has_shape(std::initializer_list<int64_t> sizes) const {
    if (dims != static_cast<int32_t>(sizes.size())) return false;
    for (int32_t i = 0; i < dims; i++)
      if (shape[i] != sizes.begin()[i]) return false;
    return true;
  }
  int64_t elements() const {
    int64_t count = 1;
    for (int32_t i = 0; i < dims; i++) count *= shape[i];
    return count;
  }
  int64_t stride(int32_t axis) const { return shape[axis] == 1 ? 0 : strides[axis]; }
  bool rows_dense() const { return dims > 0 && (shape[dims - 1] == 1 || strides[dims - 1] == 1); }
  bool dense() const {
    int64_t expected = 1;
    for (int32_t i = dims; i-- > 0; expected *= shape[i])
      if (shape[i] != 1 && strides[i] != expected) return false;
    return true;
  }
};

// A number of bf16 or fp16 in float; fp16 as load_as does it (cpu/simd.h).
inline float widened(uint16_t half, DType dtype) {
  const auto number = [](uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  const uint32_t wide = half;
  if (dtype == DType::bf16) return number(wide << 16);
  const float magnitude = (wide & 0x7c00u) == 0x7c00u ? number(0x7f800000u | (wide & 0x3ffu) << 13)
                                                      : number((wide & 0x7fffu) << 13) * 0x1p112f;
  return wide & 0x8000u ? -magnitude : magnitude;
}

// Elements in float32, where they are or copied; null for other dtypes and layouts.
inline const float* widened(const Tensor& x, std::vector<float>& copy) {
  if (!x.dense()) return nullptr;
  if (x.is(DType::f32)) return static_cast<const float*>(x.data);
  if (!x.is(DType::bf16) && !x.is(DType::f16)) return nullptr;
  copy.resize(static_cast<size_t>(x.elements()));
  for (size_t i = 0; i < copy.size(); i++)
    copy[i] = widened(static_cast<const uint16_t*>(x.data)[i], static_cast<DType>(x.code()));
  return copy.data();
}

inline bool is_narrow(const Tensor& x) { return x.is(DType::f32) || x.is(DType::bf16) || x.is(DType::f16); }

// The addresses [from, to) that a tensor with elements reaches.
struct Reach {
  uintptr_t from, to;
  explicit Reach(const Tensor& x) {
    int64_t low = 0, high = 0;
    for (int32_t i = 0; i < x.dims; i++) (x.strides[i] < 0 ? low : high) += (x.shape[i] - 1) * x.strides[i];
    const int64_t item = x.bits / 8;
    from = reinterpret_cast<uintptr_t>(x.data) + static_cast<uintptr_t>(low * item);
    to = reinterpret_cast<uintptr_t>(x.data) + static_cast<uintptr_t>((high + 1) * item);
  }
  bool meets(const Reach& other) const { return from < other.to && other.from < to; }
};

// Whether x, which is to be written, has a place of its own for each element, and none in common with the others. Every
// axis must step over what the axes with shorter strides reach.
inline bool is_apart(const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (int32_t i = 0; i < x.dims; i++) {
    int64_t reach = 0;
    for (int32_t j = 0; j < x.dims; j++)
      if (x.strides[j] < x.strides[i] || (x.strides[j] == x.strides[i] && j < i))
        reach += (x.shape[j] - 1) * x.strides[j];
    if (x.shape[i] > 1 && x.strides[i] <= reach) return false;
  }
  for (const Tensor* other : others)
    if (other->data && Reach(x).meets(Reach(*other))) return false;
  return true;
}

constexpr int kMostDims = 8;  // of a new tensor

// What has to be known of PyTorch, told once by pyrepr/ops/_native.py; never freed.
struct Torch {
  int (*read)(void* object, Tensor* out) = nullptr;
  py::handle tensor, parameter, is_neg, new_empty, written;
  py::handle is_cpu, requires_grad;  // names of attributes
  py::handle dtype_name, float32;    // a keyword, as a tuple, and a value of it
};
inline Torch& torch() {
  static Torch& torch = *new Torch;
  return torch;
}

inline bool learn_torch(const py::object& torch_module) {
  struct Exchange {
    uint32_t major, minor;
    const Exchange* older;
    void* unused[3];
    int (*read)(void*, Tensor*);
  };
  const py::object tensor = torch_module.attr("Tensor");
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  auto found = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (found && found->major != 1) found = found->older;
  if (!found || !found->read) return false;
  Torch& known = torch();
  known.tensor = py::object(tensor).release();
  known.parameter = py::object(torch_module.attr("nn").attr("Parameter")).release();
  known.is_neg = py::object(tensor.attr("is_neg")).release();
  known.new_empty = py::object(tensor.attr("new_empty")).release();
  known.written = py::object(torch_module.attr("autograd").attr("graph").attr("increment_version")).release();
  known.float32 = py::object(torch_module.attr("float32")).release();
  const auto name = [](const char* text) { return py::handle(PyUnicode_InternFromString(text)); };
  known.is_cpu = name("is_cpu");
  known.requires_grad = name("requires_grad");
  known.dtype_name = py::make_tuple(name("dtype")).release();
  known.read = found->read;
  return true;
}

// Reads tensors as long as they are ordinary: of no subclass, in CPU memory, no lazily negated view, and with no
// gradient to keep books of. Lazy conjugation is complex numbers' alone, which no kernel takes.
class Reader {
 public:
  explicit Reader(bool grad) : grad_(grad) {}

  bool read(py::handle object, Tensor& out) {
    const Torch& known = torch();
    const py::handle type(reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())));
    if (type.ptr() != known.tensor.ptr() && type.ptr() != known.parameter.ptr()) return false;
    // DLPack describes meta tensors by an exception that is slow to make.
    if (first_ && !is_true(PyObject_GetAttr(object.ptr(), known.is_cpu.ptr()))) return false;
    first_ = false;
    PyObject* self = object.ptr();
    if (is_true(PyObject_Vectorcall(known.is_neg.ptr(), &self, 1, nullptr))) return false;
    if (grad_ && is_true(PyObject_GetAttr(self, known.requires_grad.ptr()))) return false;
    if (known.read(self, &out)) {
      PyErr_Clear();
      return false;
    }
    constexpr int32_t kCpu = 1;
    // Zeros that torch keeps without memory, and tensors whose storage was freed.
    if (!out.data && out.elements()) return false;
    out.data = static_cast<char*>(out.data) + out.offset;
    return out.device_type == kCpu;
  }

 private:
  static bool is_true(PyObject* result) {
    if (!result) throw py::error_already_set();
    Py_DECREF(result);
    return result == Py_True;
  }

  const bool grad_;
  bool first_ = true;
};

// Tells autograd that a tensor is about to be overwritten, so that it notices if it was kept for a backward.
inline void tell_written(py::handle x) {
  PyObject* object = x.ptr();
  PyObject* const done = PyObject_Vectorcall(torch().written.ptr(), &object, 1, nullptr);
  if (!done) throw py::error_already_set();
  Py_DECREF(done);
}

// A new tensor [sizes] on the device of `like` and of its dtype, or of float32.
inline py::object new_empty(py::handle like, const int64_t* sizes, int count, bool float32 = false) {
  PyObject* args[kMostDims + 2] = {like.ptr()};
  for (int i = 0; i < count; i++) args[i + 1] = PyLong_FromLongLong(sizes[i]);
  args[count + 1] = torch().float32.ptr();
  PyObject* const made = PyObject_Vectorcall(torch().new_empty.ptr(), args, static_cast<size_t>(count) + 1,
                                             float32 ? torch().dtype_name.ptr() : nullptr);
  for (int i = 0; i < count; i++) Py_DECREF(args[i + 1]);
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

}  // namespace pyrepr
