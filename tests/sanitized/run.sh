#!/usr/bin/env bash
# The kernels under sanitizers: tests/sanitized/run.sh [asan] [msan] [tsan] [ROUNDS]. Default: all three, in minutes.
#
#   asan  g++, AddressSanitizer and UndefinedBehaviorSanitizer: every byte beyond a buffer, every undefined operation.
#   msan  clang++, MemorySanitizer, on one thread (#pragma omp ignored): every decision or result on unwritten memory.
#   tsan  clang++ with its own OpenMP runtime, ThreadSanitizer and Archer, which tells it what OpenMP orders; GCC's
#         runtime synchronises by futexes that ThreadSanitizer cannot see.
#
# Needs g++ and, for the last two, Debian's or Ubuntu's clang, libomp-dev and llvm's runtime for it.
set -euo pipefail
cd "$(dirname "$0")/../.."
rounds=40 kinds=()
for word in "$@"; do [[ $word =~ ^[0-9]+$ ]] && rounds=$word || kinds+=("$word"); done
[ ${#kinds[@]} -gt 0 ] || kinds=(asan msan tsan)
mapfile -t families < <(sed -n 's/^PYREPR_FAMILY(\([a-z0-9_]*\),.*/\1/p' csrc/families.h)
# The levels beyond avx512 that a family has code of its own for. Tiles are stored by instructions that msan cannot see.
beyond() {
  local all
  all=$(sed -n "s/^PYREPR_FAMILY($1, [A-Za-z0-9]*, \(.*\), \(.*\))/\1 \2/p" csrc/families.h)
  for level in avx512_bf16 amx; do
    [[ " $all " != *" $level "* || $2$level == msanamx ]] || echo $level
  done
}
build=$(mktemp -d)
launcher=$(command -v ccache || true)
trap 'rm -rf "$build"' EXIT

declare -A flags=([baseline]="" [avx2]="-mavx2 -mfma -mf16c")
flags[avx512]="${flags[avx2]} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
flags[avx512_bf16]="${flags[avx512]} -mavx512vnni -mavx512vbmi -mavx512bf16"
flags[amx]="${flags[avx512_bf16]} -DPYREPR_LEVEL_avx512_bf16"
levels=(baseline)
[ "$(uname -m)" != x86_64 ] || levels=(baseline avx2 avx512)

# compile KIND: the driver and every family at every level, as in CMakeLists.txt, with $compiler and $options.
compile() {
  local out=$build/$1 jobs=() family level
  mkdir "$out"
  one() { $launcher "$compiler" -std=c++17 -Icsrc -Itests/sanitized $options "${@:3}" -c "$1" -o "$2"; }
  for family in "${families[@]}"; do
    [ -f "csrc/cpu/$family.cpp" ] || continue
    for level in "${levels[@]}" $([ ${#levels[@]} -eq 1 ] || beyond $family $1); do
      jobs+=("csrc/cpu/$family.cpp $out/${family}_$level.o -DPYREPR_LEVEL=$level -DPYREPR_LEVEL_$level -fno-math-errno -fno-trapping-math ${flags[$level]}")
    done
    [ ! -f "tests/sanitized/$family.cpp" ] || jobs+=("tests/sanitized/$family.cpp $out/run_$family.o")
  done
  built=$(printf ' -DPYREPR_BUILT_%s' "${levels[@]}" $([ ${#levels[@]} -eq 1 ] || { echo avx512_bf16; [ $1 == msan ] || echo amx; }))
  jobs+=("tests/sanitized/driver.cpp $out/driver.o" "csrc/cpu/dispatch.cpp $out/dispatch.o$built")
  export -f one && export compiler options launcher
  printf '%s\n' "${jobs[@]}" | xargs -P "$(nproc)" -d '\n' -I{} bash -c 'one {}'
  "$compiler" $options "$out"/*.o -o "$out/driver"
}

# check KIND: the driver finds nothing, and is seen to find what is planted.
check() {
  if "$build/$1/driver" plant "$1" >"$build/planted" 2>&1; then
    echo "$1 does not see a planted mistake" >&2
    return 1
  fi
  grep -q Sanitizer "$build/planted" || { cat "$build/planted" >&2; return 1; }
  "$build/$1/driver" "$rounds"
}

for kind in "${kinds[@]}"; do
  started=$SECONDS
  case $kind in
    asan)
      compiler=g++ options="-O1 -g1 -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
      compile asan
      # Not detect_stack_use_after_return: GCC before 13.3 misaligns 64-byte vectors on its stack (GCC bug 110027).
      export ASAN_OPTIONS=detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
      ;;
    msan)
      compiler=clang++ options="-O1 -g1 -Itests/sanitized/serial -Wno-unknown-pragmas -Wno-source-uses-openmp -fsanitize=memory -fno-omit-frame-pointer"
      compile msan
      ;;
    tsan)
      compiler=clang++ options="-O1 -g1 -fopenmp=libomp -fsanitize=thread -fno-omit-frame-pointer"
      compile tsan
      archer=$(find /usr/lib/llvm-* -name 'libarcher.so' 2>/dev/null | sort | tail -1)
      [ -n "$archer" ] || { echo "libarcher.so is missing (apt-get install libomp-dev)" >&2; exit 1; }
      export OMP_TOOL_LIBRARIES=$archer TSAN_OPTIONS=ignore_noninstrumented_modules=1
      ;;
    *) echo "unknown sanitizer $kind; expected asan, msan or tsan" >&2; exit 2 ;;
  esac
  check "$kind"
  echo "$kind: clean, $((SECONDS - started)) s"
done
