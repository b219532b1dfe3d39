// Bindings of family `lookup`.
#include <cmath>

#include "bindings/blocks.h"
#include "bindings/common.h"
#include "bindings/tensor.h"
#ifdef PYREPR_CUDA
#include "cuda/lookup.h"
#endif

namespace pyrepr {
namespace {

cpu::LookupTables tables_from(uintptr_t data, int type, uintptr_t scales, int64_t K, int64_t n, int64_t h, bool packed,
                              int threads) {
  if (type < 0 || type > 4) throw std::invalid_argument("table type code " + std::to_string(type) + " is unknown");
  if (K < 0 || n < 0 || h < 0 || threads < 1)
    throw std::invalid_argument("sizes must not be negative, threads positive");
  if (packed && h % cpu::kLookupTile) throw std::invalid_argument("packed tables must have whole tiles of columns");
  if ((type == 4) != (scales != 0) && data) throw std::invalid_argument("int8 tables, and only they, need scales");
  return {pointer<const void>(data, "tables", true),
          static_cast<cpu::TableType>(type),
          pointer<const float>(scales, "scales", true),
          K,
          n,
          h,
          packed,
          threads};
}

View view_of(const MatrixTuple& matrix, const char* what) {
  const auto& [data, rows, cols, row_stride, col_stride] = matrix;
  if (cols > 1 && col_stride != 1) throw std::invalid_argument(std::string(what) + " must have contiguous rows");
  return {pointer<const void>(data, what, rows == 0 || cols == 0), rows, cols, row_stride, 1};
}

const cpu::LookupHash& checked_hash(const cpu::LookupHash& hash) {
  const int weighting = static_cast<int>(hash.weighting), kind = static_cast<int>(hash.kind);
  if (kind < 1 || kind > 2) throw std::invalid_argument("hash code " + std::to_string(kind) + " is unknown");
  if (hash.bits < 1 || hash.bits > 16 || hash.bits % kind || hash.x.cols % (hash.bits / kind))
    throw std::invalid_argument("x does not consist of chunks of `bits` bits");
  if ((hash.centre == nullptr) != (hash.scale == nullptr)) throw std::invalid_argument("centre and scale go together");
  if (weighting < 0 || weighting > 3)
    throw std::invalid_argument("weighting code " + std::to_string(weighting) + " is unknown");
  if (hash.threads < 1) throw std::invalid_argument("threads must be positive");
  return hash;
}

cpu::LookupHash hash_from(const MatrixTuple& x, int dtype, int64_t bits, int weighting, double temperature, int kind,
                          uintptr_t centre, uintptr_t scale, int threads) {
  return checked_hash({view_of(x, "x"), dtype_of(dtype), bits, static_cast<cpu::Weighting>(weighting), temperature,
                       threads, static_cast<cpu::Hash>(kind), pointer<const void>(centre, "centre", true),
                       pointer<const void>(scale, "scale", true)});
}

cpu::LookupRoute route_from(int route) {
  if (route < 0 || route > 4) throw std::invalid_argument("route code " + std::to_string(route) + " is unknown");
  return static_cast<cpu::LookupRoute>(route);
}

// Codes come from the caller's data: what is out of range must not become an address.
const int32_t* checked_codes(uintptr_t address, int64_t count, int64_t n) {
  const int32_t* const codes = pointer<const int32_t>(address, "codes", count == 0);
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < count; i++) {
    low = codes[i] < low ? codes[i] : low;
    high = codes[i] > high ? codes[i] : high;
  }
  if (count && (low < 0 || high >= n))
    throw py::index_error("codes must be from 0 to n - 1 = " + std::to_string(n - 1) + ", got " +
                          std::to_string(low < 0 ? low : high));
  return codes;
}

bool same_precision(DType x, cpu::TableType tables) { return (x == DType::f64) == (tables == cpu::TableType::f64); }

// One call with plain numbers: at one token, making a tuple or an object costs as much as the arithmetic.
void lookup_linear(uintptr_t data, int type, uintptr_t scales, int64_t K, int64_t n, int64_t h, bool packed,
                   uintptr_t x, int dtype, int64_t rows, int64_t stride, int64_t bits, int weighting,
                   double temperature, int kind, uintptr_t centre, uintptr_t scale, uintptr_t down, uintptr_t up,
                   int64_t rank, uintptr_t bias, int route, uintptr_t out, int threads) {
  const cpu::LookupTables tables = tables_from(data, type, scales, K, n, h, packed, threads);
  const bool empty = rows == 0 || h == 0;
  const View view{pointer<const void>(x, "x", empty || K == 0), rows, K * bits / (kind == 2 ? 2 : 1), stride, 1};
  const cpu::LookupHash hash =
      checked_hash({view, dtype_of(dtype), bits, static_cast<cpu::Weighting>(weighting), temperature, threads,
                    static_cast<cpu::Hash>(kind), pointer<const void>(centre, "centre", true),
                    pointer<const void>(scale, "scale", true)});
  if (rank < 0) throw std::invalid_argument("rank must not be negative");
  const bool dense = rank > 0 && !empty;
  const cpu::LookupLowRank low{rank, pointer<const void>(down, "down", !dense || K == 0),
                               pointer<const void>(up, "up", !dense)};
  if (n != int64_t(1) << bits || !same_precision(hash.dtype, tables.type))
    throw std::invalid_argument("x and tables do not fit together");
  if (!tables.data && K && !empty) throw std::invalid_argument("tables has no memory");
  void* const to = pointer<void>(out, "out", empty);
  const void* const added = pointer<const void>(bias, "bias", true);
  const cpu::LookupRoute way = route_from(route);
  py::gil_scoped_release release;
  if (!empty) check(current_level().lookup().linear(tables, hash, low, added, way, to));
}

// What lookup_linear and sign_linear take beside their tables or weights, as users give it: x [..., d], bias [h] or
// None, and as a tuple of four (as one argument it costs a quarter of what four do) what converted layers have: centre
// and scale [d], and down [rank, d] and up [rank, h], or None.
struct AroundLookup {
  Tensor x, bias{}, centre{}, scale{}, down{}, up{};
  bool has_bias, converted, low_rank;
  int64_t rank = 0, rows = 1, sizes[kMostDims];  // sizes of out

  bool read(Reader& reader, py::handle x_, py::handle bias_, py::handle rest) {
    if (!PyTuple_CheckExact(rest.ptr()) || PyTuple_GET_SIZE(rest.ptr()) != 4) return false;
    const auto given = [&](int i) { return py::handle(PyTuple_GET_ITEM(rest.ptr(), i)); };
    has_bias = !bias_.is_none();
    converted = !given(0).is_none();
    low_rank = !given(2).is_none();
    if (converted == given(1).is_none() || low_rank == given(3).is_none()) return false;
    return reader.read(x_, x) && (!has_bias || reader.read(bias_, bias)) &&
           (!converted || (reader.read(given(0), centre) && reader.read(given(1), scale))) &&
           (!low_rank || (reader.read(given(2), down) && reader.read(given(3), up)));
  }
  DType sums() const { return x.is(DType::f64) ? DType::f64 : DType::f32; }
  int64_t d() const { return x.shape[x.dims - 1]; }
  // Between rows of x.
  int64_t stride() const { return x.dims == 2 ? x.stride(0) : d(); }
  bool layout_fits(int64_t h) {
    if (x.dims < 1 || x.dims > kMostDims || !x.rows_dense() || (x.dims != 2 && !x.dense())) return false;
    for (int i = 0; i + 1 < x.dims; i++) rows *= sizes[i] = x.shape[i];
    sizes[x.dims - 1] = h;
    if (low_rank && down.dims == 2) rank = down.shape[0];
    return rows * h * d() > 0 && (!has_bias || bias.has_shape({h})) &&
           (!converted || (centre.has_shape({d()}) && scale.has_shape({d()}))) &&
           (!low_rank || (down.has_shape({rank, d()}) && up.has_shape({rank, h})));
  }
  bool dtypes_fit() const {
    return x.code() >= 0 && x.code() <= 3 && (!has_bias || added(bias)) &&
           (!converted || (added(centre) && added(scale))) && (!low_rank || (added(down) && added(up)));
  }
  // [..., h] in float32 (float64 for float64), and its address.
  std::pair<py::object, uintptr_t> new_out(py::handle x_) const {
    py::object out = new_empty(x_, sizes, x.dims, sums() == DType::f32 && !x.is(DType::f32));
    Tensor to;
    return {out, Reader(false).read(out, to) ? address(to) : 0};
  }
  static uintptr_t address(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.data); }

 private:
  bool added(const Tensor& tensor) const { return tensor.is(sums()) && tensor.dense(); }
};

// And its tables [K, n, h] or packed, with scales [K, n] or None.
struct LookupLinear : AroundLookup {
  Tensor tables, scales{};
  bool has_scales, packed;
  int64_t K, n, h, bits = 0;

  LookupLinear(int kind) : kind_(kind) {}
  bool read(py::handle x_, py::handle tables_, py::handle scales_, py::handle bias_, py::handle rest, bool grad) {
    Reader reader(grad);
    has_scales = !scales_.is_none();
    return AroundLookup::read(reader, x_, bias_, rest) && reader.read(tables_, tables) &&
           (!has_scales || reader.read(scales_, scales));
  }
  bool fits() {
    packed = tables.dims == 4 && tables.shape[3] == cpu::kLookupTile;
    if (!(packed || tables.dims == 3) || !tables.dense()) return false;
    K = tables.shape[packed];
    n = tables.shape[packed + 1];
    h = packed ? tables.shape[0] * cpu::kLookupTile : tables.shape[2];
    while (bits < 16 && int64_t(1) << bits < n) bits++;
    const int type = tables.code();
    return layout_fits(h) && dtypes_fit() && bits > 0 && n == int64_t(1) << bits && bits % kind_ == 0 &&
           d() == K * (bits / kind_) && type >= 0 && same_precision(sums(), static_cast<cpu::TableType>(type)) &&
           has_scales == (type == 4) &&
           (!has_scales || (scales.has_shape({K, n}) && scales.is(DType::f32) && scales.dense()));
  }

 private:
  const int kind_;
};

// [..., h] in float32 (float64 for float64), or None: see tensor.h.
py::object lookup_linear_direct(py::handle x, py::handle tables, py::handle scales, py::handle bias,
                                py::handle converted, int weighting, py::handle temperature, int kind, bool grad,
                                int threads) {
  if (kind < 1 || kind > 2) return py::none();
  LookupLinear a(kind);
  if (weighting < 0 || !PyFloat_Check(temperature.ptr())) return py::none();
  const double t = PyFloat_AS_DOUBLE(temperature.ptr());
  if (!(t > 0 && std::isfinite(t)) || !a.read(x, tables, scales, bias, converted, grad) || !a.fits()) return py::none();
  const auto [out, to] = a.new_out(x);
  if (!to) return py::none();
  const auto address = AroundLookup::address;
  lookup_linear(address(a.tables), a.tables.code(), address(a.scales), a.K, a.n, a.h, a.packed, address(a.x),
                a.x.code(), a.rows, a.stride(), a.bits, weighting, t, kind, address(a.centre), address(a.scale),
                address(a.down), address(a.up), a.rank, address(a.bias), 0, to, threads);
  return out;
}

// What a code's chunk may have: as many of 8 bits as are in whole chunks.
int64_t bits_of_signs(int64_t d, int kind) {
  int64_t bits = 8;
  while (d % (bits / kind)) bits /= 2;
  return bits;
}

void sign_linear(const MatrixTuple& x, int dtype, uintptr_t weight, int64_t h, uintptr_t scales, uintptr_t bias,
                 int kind, uintptr_t centre, uintptr_t scale, uintptr_t down, uintptr_t up, int64_t rank, uintptr_t out,
                 int threads) {
  if (kind < 1 || kind > 2) throw std::invalid_argument("hash code " + std::to_string(kind) + " is unknown");
  const int64_t rows = std::get<1>(x), d = std::get<2>(x);
  if (h < 0 || rank < 0) throw std::invalid_argument("sizes must not be negative");
  const cpu::LookupHash hash = hash_from(x, dtype, bits_of_signs(d, kind), static_cast<int>(cpu::Weighting::none), 1,
                                         kind, centre, scale, threads);
  if (hash.dtype == DType::f64) throw std::invalid_argument("x must not be float64");
  const bool empty = rows == 0 || h == 0, dense = rank > 0 && !empty;
  const cpu::LookupSigns signs{pointer<const int8_t>(weight, "weight", empty || d == 0),
                               pointer<const float>(scales, "scales", empty), h, d * kind, threads};
  const cpu::LookupLowRank low{rank, pointer<const void>(down, "down", !dense || d == 0),
                               pointer<const void>(up, "up", !dense)};
  const float* const added = pointer<const float>(bias, "bias", true);
  float* const to = pointer<float>(out, "out", empty);
  py::gil_scoped_release release;
  if (!empty) check(current_level().lookup().signs(signs, hash, low, added, to));
}

// The same with tensors as users give them: weight [h, features] of 8-bit integers, scales [h].
py::object sign_linear_direct(py::handle x, py::handle weight, py::handle scales, py::handle bias, py::handle converted,
                              int kind, bool grad, int threads) {
  AroundLookup a;
  Tensor w, by;
  Reader reader(grad);
  if (kind < 1 || kind > 2 || !reader.read(weight, w) || w.code() != 4 || w.dims != 2 || !w.dense() ||
      !reader.read(scales, by) || !by.has_shape({w.shape[0]}) || !by.is(DType::f32) || !by.dense() ||
      !a.read(reader, x, bias, converted) || !a.layout_fits(w.shape[0]) || !a.dtypes_fit() || a.x.is(DType::f64) ||
      w.shape[1] != a.d() * kind)
    return py::none();
  const auto [out, to] = a.new_out(x);
  if (!to) return py::none();
  const auto address = AroundLookup::address;
  sign_linear({address(a.x), a.rows, a.d(), a.stride(), 1}, a.x.code(), address(w), w.shape[0], address(by),
              address(a.bias), kind, address(a.centre), address(a.scale), address(a.down), address(a.up), a.rank, to,
              threads);
  return out;
}

void lookup_sum(const cpu::LookupTables& tables, uintptr_t codes, uintptr_t weights, int64_t tokens, int route,
                uintptr_t out) {
  const bool empty = tokens == 0 || tables.h == 0;
  const int32_t* const checked = checked_codes(codes, tokens * tables.K, tables.n);
  if (!tables.data && tables.K && !empty) throw std::invalid_argument("tables has no memory");
  const void* const w = pointer<const void>(weights, "weights", empty || tables.K == 0);
  void* const data = pointer<void>(out, "out", empty);
  const cpu::LookupRoute way = route_from(route);
  py::gil_scoped_release release;
  if (!empty) check(current_level().lookup().sum(tables, tokens, checked, w, way, data));
}

void lookup_backward(const cpu::LookupTables& tables, const MatrixTuple& grad, uintptr_t codes, uintptr_t weights,
                     uintptr_t first, uintptr_t segments, uintptr_t dots) {
  const View g = view_of(grad, "grad");
  if (tables.packed) throw std::invalid_argument("the backward takes tables that are not packed");
  if (g.cols != tables.h) throw std::invalid_argument("grad and tables do not fit together");
  const int32_t* const checked = checked_codes(codes, g.rows * tables.K, tables.n);
  const void* const w = pointer<const void>(weights, "weights", g.rows * tables.K == 0);
  if (dots && !tables.data && tables.K && tables.h) throw std::invalid_argument("tables has no memory");
  py::gil_scoped_release release;
  const int64_t item = tables.type == cpu::TableType::f64 ? 8 : 4;
  if (segments && !first) huge_pages(segments, tables.K * tables.n * tables.h * item, false);
  check(current_level().lookup().backward(tables, g, checked, w, reinterpret_cast<const int64_t*>(first),
                                          reinterpret_cast<void*>(segments), reinterpret_cast<void*>(dots)));
}

#ifdef PYREPR_CUDA
void cuda_lookup_linear(const MatrixTuple& x, int dtype, uintptr_t tables, int table_type, uintptr_t scales, int64_t K,
                        int64_t h, int bits, int weighting, double slope, uintptr_t bias, int bias_dtype,
                        uintptr_t partial, int64_t parts, uintptr_t out, uintptr_t stream) {
  const View rows = view_of(x, "x");
  if (bits < 1 || bits > 16 || rows.cols != K * bits) throw std::invalid_argument("x and tables do not fit together");
  if (weighting < 0 || weighting > 3) throw std::invalid_argument("weighting is unknown");
  if ((table_type == 4) != (scales != 0)) throw std::invalid_argument("int8 tables, and only they, need scales");
  const bool empty = rows.rows == 0 || h == 0;
  const cuda::LookupLinear call{rows.data,
                                dtype_of(dtype),
                                rows.row_stride,
                                pointer<const void>(tables, "tables", empty || K == 0),
                                table_type,
                                pointer<const float>(scales, "scales", true),
                                pointer<const void>(bias, "bias", true),
                                dtype_of(bias_dtype),
                                pointer<void>(out, "out", empty),
                                pointer<float>(partial, "partial", true),
                                parts,
                                rows.rows,
                                K,
                                h,
                                bits,
                                weighting,
                                static_cast<float>(slope)};
  py::gil_scoped_release release;
  if (const char* reason = cuda::lookup_linear(call, reinterpret_cast<void*>(stream)))
    throw std::runtime_error(std::string("CUDA kernel of lookup_linear: ") + reason);
}
#endif

}  // namespace

void bind_lookup(py::module_& m) {
  py::class_<cpu::LookupTables>(m, "LookupTables")
      .def(py::init(&tables_from))
      .def("sum", &lookup_sum)
      .def("backward", &lookup_backward);

#if defined(__linux__)
  py::class_<Block>(m, "Block", py::buffer_protocol())
      .def(py::init<int64_t>())
      .def_buffer([](const Block& block) { return py::buffer_info(static_cast<uint8_t*>(block.data()), block.size()); })
      .def_static("waiting", &Block::waiting)
      .def_static("limit", &Block::limit)
      .def_static("release", &Block::release);
#endif
  m.def("lookup_linear", &lookup_linear);
  m.def("sign_linear", &sign_linear);
  m.def("sign_linear_direct", &sign_linear_direct);
  m.def("lookup_linear_direct", &lookup_linear_direct);
  m.def("huge_pages", [](uintptr_t address, int64_t bytes) {
    py::gil_scoped_release release;
    return huge_pages(address, bytes, true);
  });
  m.def("lookup_hash", [](const MatrixTuple& x, int dtype, int64_t bits, int weighting, double temperature, int kind,
                          uintptr_t centre, uintptr_t scale, uintptr_t codes, uintptr_t weights, int threads) {
    const cpu::LookupHash hash = hash_from(x, dtype, bits, weighting, temperature, kind, centre, scale, threads);
    const bool empty = hash.x.rows * hash.x.cols == 0;
    int32_t* const c = pointer<int32_t>(codes, "codes", empty);
    void* const w = pointer<void>(weights, "weights", empty);
    py::gil_scoped_release release;
    if (!empty) check(current_level().lookup().hash(hash, c, w));
  });
  m.def("lookup_hash_backward",
        [](const MatrixTuple& x, int dtype, int64_t bits, int weighting, double temperature, int kind, uintptr_t centre,
           uintptr_t scale, uintptr_t grad_weights, uintptr_t grad, int threads) {
          const cpu::LookupHash hash = hash_from(x, dtype, bits, weighting, temperature, kind, centre, scale, threads);
          const bool empty = hash.x.rows * hash.x.cols == 0;
          const void* const gw = pointer<const void>(grad_weights, "grad_weights", empty);
          void* const g = pointer<void>(grad, "grad", empty);
          py::gil_scoped_release release;
          if (!empty) check(current_level().lookup().hash_backward(hash, gw, g));
        });
#ifdef PYREPR_CUDA
  m.def("cuda_lookup_linear", &cuda_lookup_linear);
  m.def("cuda_lookup_linear_parts", &cuda::lookup_linear_parts);
#endif
}

}  // namespace pyrepr
