#!/usr/bin/env bash
# cross-tools.sh DIR: the aarch64 cross compiler and the qemu user emulators, unpacked into DIR from
# the Debian mirror that apt is configured with. Nothing is installed, and root is not needed. A
# second call does nothing.
#
# DIR/bin holds aarch64-linux-gnu-{g++,gcc,nm,objdump,readelf}, qemu-aarch64 and qemu-x86_64.
set -euo pipefail
dir=$(mkdir -p "${1:?usage: cross-tools.sh DIR}" && cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/debian.sh
. "$here/debian.sh"
[[ -e "$dir/.ready" ]] && exit
need_debian

cross=aarch64-linux-gnu
echo "cross-tools: g++ and qemu"
rm -rf "$dir/root" "$dir/bin"
mkdir -p "$dir/root" "$dir/bin"

# The compiler of this machine's own release: what it needs of the system is there.
fetch "$dir/apt" "$(release)" "$(dpkg --print-architecture)" /var/lib/dpkg/status g++-$cross
unpack "$dir/apt" "$dir/root"
# Emulators that know the CPUs of today, statically linked.
fetch "$dir/apt" trixie "$(dpkg --print-architecture)" alone qemu-user
unpack "$dir/apt" "$dir/root" ./usr/bin/qemu-aarch64 ./usr/bin/qemu-x86_64

for tool in g++ gcc nm objdump readelf; do
  sysroot=$([[ $tool == g* ]] && echo "--sysroot=$dir/root" || true)
  cat >"$dir/bin/$cross-$tool" <<SH
#!/bin/sh
export LD_LIBRARY_PATH=$dir/root/usr/lib/$(uname -m)-linux-gnu\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
exec $dir/root/usr/bin/$cross-$tool $sysroot "\$@"
SH
  chmod +x "$dir/bin/$cross-$tool"
done
ln -s ../root/usr/bin/qemu-aarch64 ../root/usr/bin/qemu-x86_64 "$dir/bin"
touch "$dir/.ready"
