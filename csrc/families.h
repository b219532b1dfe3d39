// The kernel families, told once: name, type of its functions, whose code it
// runs at levels avx512_bf16 and amx, which some have no code of their own for. Each is csrc/cpu/<name>.cpp and csrc/bindings/<name>.cpp. Define PYREPR_FAMILY, then include; CMakeLists.txt
// reads these lines too.
PYREPR_FAMILY(gram, GramFunctions, avx512_bf16, amx)
PYREPR_FAMILY(moments, MomentsFunctions, avx512, avx512)
PYREPR_FAMILY(pairs, PairsFunctions, avx512_bf16, amx)
PYREPR_FAMILY(delta_rule, DeltaRuleFunctions, avx512, amx)
PYREPR_FAMILY(lookup, LookupFunctions, avx512_bf16, amx)
PYREPR_FAMILY(causal_conv1d, CausalConvFunctions, avx512, avx512)
PYREPR_FAMILY(probe, ProbeFunctions, avx512, avx512)
#undef PYREPR_FAMILY
