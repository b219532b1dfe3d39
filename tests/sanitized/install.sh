#!/usr/bin/env bash
# What run.sh needs beside g++, on Debian and Ubuntu: clang with its sanitizers and its OpenMP runtime.
set -euo pipefail
present() {
  command -v clang++ >/dev/null && find /usr/lib/llvm-* -name libarcher.so 2>/dev/null | grep -q . &&
    find /usr/lib/llvm-* -name 'libclang_rt.tsan*.a' 2>/dev/null | grep -q .
}
if present; then exit 0; fi
root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
root apt-get update -qq
root apt-get install -qq --no-install-recommends clang libomp-dev "libclang-rt-$(apt-cache depends clang | sed -n 's/.*Depends: clang-//p')-dev"
