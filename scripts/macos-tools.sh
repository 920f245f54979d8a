#!/usr/bin/env bash
# macos-tools.sh DIR: what builds for macOS 14 on arm64 on another system, and what the result is held
# to. Needs PyPI's ziglang in .venv. What is there already is not made again.
#
# DIR/c++                a C++ compiler; the C++ library that it links with is the system's
# DIR/python             Python's headers with the configuration of macOS
# DIR/torch-OLDEST/torch the headers and libraries of the oldest torch's wheel for macOS
# DIR/torch-V.json       what the libraries in the wheel of torch V import and export
# DIR/missing            versions without a wheel to be had
set -euo pipefail
dir=$(mkdir -p "${1:?usage: macos-tools.sh DIR}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
oldest=2.10.0
torches=("$oldest" 2.12.0 2.13.0 2.14.0 2.15.0)
built=$("$python" -c 'import torch; print(torch.__version__.split("+")[0])')

"$python" -c 'import ziglang' 2>/dev/null || {
  echo "macos-tools: ziglang is missing: pip install -r requirements/wheels.txt" >&2
  exit 1
}

# Any Python's wheel will do: what is read has nothing to do with its version.
download() {
  "$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.11 --implementation cp --abi cp311 --abi none \
    --platform macosx_14_0_arm64 --platform macosx_11_0_arm64 --dest "$2" "torch==$1"
}

: >"$dir/missing"
for torch in "${torches[@]}"; do
  [[ -e $dir/torch-$torch.json ]] && continue
  work=$(mktemp -d "$dir/unpack-XXXXXX")
  if ! download "$torch" "$work"; then
    rm -rf "$work"
    echo "macos-tools: there is no wheel of torch $torch for macOS to be had" >&2
    [[ $torch != "$oldest" && $torch != "$built" ]] || exit 1
    echo "$torch" >>"$dir/missing"
    continue
  fi
  echo "macos-tools: torch $torch"
  [[ $torch == "$oldest" ]] && folders=(torch/lib/ torch/include/) || folders=(torch/lib/)
  "$python" scripts/macos_wheel.py unpack "$work"/torch-*.whl "$work" "${folders[@]}"
  "$python" scripts/macos_wheel.py record "$work/torch/lib" "$work/record"
  if [[ $torch == "$oldest" ]]; then
    rm -rf "$dir/torch-$torch"
    mkdir "$dir/torch-$torch"
    mv "$work/torch" "$dir/torch-$torch"
  fi
  mv "$work/record" "$dir/torch-$torch.json"
  rm -rf "$work"
done

"$python" scripts/macos_wheel.py stub "$dir/libc++.1.tbd" "$dir"/torch-*.json

rm -rf "$dir/python"
cp -R "$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')" "$dir/python"
cp scripts/macos/pyconfig.h "$dir/python/pyconfig.h"

# zig has names of its own for what follows -march=. As c++ it would link a C++ library of its own, and
# its headers take the newest system for granted unless they are told to look at the one that is named.
cat >"$dir/c++.new" <<SH
#!/bin/bash
language=c++ libraries=()
annotated=_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS
flags=(-fno-sized-deallocation "-U\$annotated" "-D\$annotated=1")
for flag; do
  case \$flag in
    -shared) language=cc libraries=("$dir/libc++.1.tbd" -O2) ;;
    -march=armv8-a*) flag=-mcpu=generic ;;
    -march=armv8.2-a*)
      flag=-mcpu=generic+v8_2a\${flag#-march=armv8.2-a}
      flag=\${flag/+fp16+/+fullfp16+}
      ;;
  esac
  flags+=("\$flag")
done
export ZIG_GLOBAL_CACHE_DIR=\${ZIG_GLOBAL_CACHE_DIR:-$dir/zig} ZIG_LOCAL_CACHE_DIR=\${ZIG_LOCAL_CACHE_DIR:-$dir/zig}
exec "$python" -m ziglang "\$language" -target aarch64-macos.14.0 "\${flags[@]}" "\${libraries[@]}"
SH
if cmp -s "$dir/c++.new" "$dir/c++"; then
  rm "$dir/c++.new"
else
  chmod +x "$dir/c++.new"
  mv "$dir/c++.new" "$dir/c++"
fi
