// What this module was built from, and how. CMakeLists.txt writes the values, in a file of their own: it is compiled
// anew in no time when one of them changes.
#pragma once

namespace pyrepr {

struct Build {
  const char* version;
  const char* interface;  // a hash of the files that Python and the module have to agree on
  const char* sources;    // a hash of all files
  const char* compiler;
  const char* flags;
  const char* left_out;       // levels that this compiler cannot make, separated by spaces
  const char* architectures;  // of the CUDA kernels, as CMake spells them, separated by spaces; empty: there are none
};

extern const Build kBuild;

}  // namespace pyrepr
