// csrc/cuda/lookup.cu as C++ (see cuda.h), behind functions that ctypes can call.
#include "lookup.inc"

using namespace pyrepr;

extern "C" int64_t parts(int64_t T, int64_t K, int64_t h, int table_type) {
  return cuda::lookup_linear_parts(T, K, h, table_type);
}

// pointers: x, tables, scales, bias, out, partial; types: of x, the tables, the bias; sizes: x_stride, parts, T, K, h.
extern "C" const char* linear(void** pointers, int* types, int64_t* sizes, int bits, int weighting, float slope) {
  const cuda::LookupLinear call{pointers[0], static_cast<DType>(types[0]),
                                sizes[0],    pointers[1],
                                types[1],    static_cast<const float*>(pointers[2]),
                                pointers[3], static_cast<DType>(types[2]),
                                pointers[4], static_cast<float*>(pointers[5]),
                                sizes[1],    sizes[2],
                                sizes[3],    sizes[4],
                                bits,        weighting,
                                slope};
  return cuda::lookup_linear(call, nullptr);
}
