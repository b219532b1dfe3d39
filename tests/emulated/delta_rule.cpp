// csrc/cuda/delta_rule.cu as C++ (see cuda.h), behind a function that ctypes can call.
#include "delta_rule.inc"

extern "C" const char* step(void* const* addresses, const int64_t* strides, const int64_t* sizes, int64_t sequences,
                            int dtype, int gate, int l2norm, float scale) {
  using namespace pyrepr;
  const auto tokens = [&](int i) {
    return cuda::Tokens{addresses[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  cuda::DeltaRuleStep p;
  p.q = tokens(0);
  p.k = tokens(1);
  p.v = tokens(2);
  p.g = static_cast<const float*>(addresses[3]);
  p.beta = static_cast<const float*>(addresses[4]);
  p.initial = static_cast<const float*>(addresses[5]);
  p.final = static_cast<float*>(addresses[6]);
  p.o = addresses[7];
  p.bounds = static_cast<const int64_t*>(addresses[8]);
  p.total = sizes[1];
  p.heads = sizes[2];
  p.width = sizes[3];
  p.value_heads = sizes[4];
  p.value_width = sizes[5];
  p.sequences = sequences;
  p.dtype = static_cast<DType>(dtype);
  p.gate = static_cast<Gate>(gate);
  p.l2norm = l2norm;
  p.scale = scale;
  return cuda::delta_rule_step(p, nullptr);
}
