#!/usr/bin/env bash
# The kernels of x86-64 on CPUs that this machine is not: kernels_test as the only program of a Linux
# that boots in Bochs. AVX2 alone, with guard pages, which qemu's masked loads touch. What is made stays in
# build/bochs; nothing is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/debian.sh
. scripts/debian.sh
# CPU model of Bochs, and the rows it must report.
models=(
  "corei7_haswell_4770 avx2 portable"
)

if [[ $(uname -sm) != "Linux x86_64" ]] || ! command -v apt-get >/dev/null || [[ -z "$(mirror)" ]]; then
  echo "test-bochs: SKIPPED: needs x86-64 Linux and a Debian mirror that apt is configured with"
  exit
fi

dir=$PWD/build/bochs
if [[ ! -e $dir/.ready ]]; then
  echo "test-bochs: Bochs and a kernel"
  rm -rf "$dir"
  mkdir -p "$dir/root" "$dir/disc"
  fetch "$dir/apt" trixie amd64 nothing bochs bochs-term genisoimage isolinux syslinux-common
  unpack "$dir/apt" "$dir/root"
  # The package of the kernel for virtual machines names the one of the day.
  fetch "$dir/apt" trixie amd64 alone linux-image-cloud-amd64
  kernel=$(dpkg-deb -f "$dir"/apt/archives/*.deb Depends | grep -o 'linux-image-[0-9][^ ,]*')
  fetch "$dir/apt" trixie amd64 alone "$kernel"
  unpack "$dir/apt" "$dir/root" --wildcards './boot/vmlinuz*'
  mv "$dir"/root/boot/vmlinuz* "$dir/disc/vmlinuz"
  cp "$dir/root/usr/lib/ISOLINUX/isolinux.bin" \
    "$dir/root/usr/lib/syslinux/modules/bios/ldlinux.c32" "$dir/disc"
  rm -rf "$dir"/root/usr/share/{doc,man,locale,icons}
  # Bochs has AMX without the feature by which Linux grants it, and Linux stops there: bit 600 off.
  cat >"$dir/disc/isolinux.cfg" <<'CFG'
default test
prompt 0
label test
 kernel vmlinuz
 append initrd=initrd.gz console=ttyS0 quiet loglevel=0 clearcpuid=600 panic=-1 reboot=t tsc=reliable mitigations=off nokaslr random.trust_cpu=on nosmp acpi=off pci=off
CFG
  ${CC:-cc} -O1 -static scripts/bochs/init.c -o "$dir/init"
  touch "$dir/.ready"
fi

# Programs of another release, with its libraries.
libraries=$dir/root/usr/lib/x86_64-linux-gnu
newer() {
  local program=$1
  shift
  "$dir/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/pulseaudio" \
    "$dir/root/usr/bin/$program" "$@"
}

echo "test-bochs: the kernels' test"
test=$(.venv/bin/python scripts/kernels_test.py | tail -n 1)

# The files that the kernel starts with: a cpio archive, for devices that only root could make.
.venv/bin/python - "$dir/init" "$test" "$dir/disc/initrd.gz" <<'PYTHON'
import gzip
import sys
from pathlib import Path

init, test, out = map(Path, sys.argv[1:])
archive = bytearray()


def add(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
    fields = (len(archive) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    for part in (head, data):
        archive.extend(part + bytes(-len(part) % 4))


add("dev", 0o40755)
add("dev/console", 0o20600, device=(5, 1))
add("dev/ttyS0", 0o20600, device=(4, 64))
add("init", 0o100755, init.read_bytes())
add("test", 0o100755, test.read_bytes())
add("TRAILER!!!", 0)
out.write_bytes(gzip.compress(bytes(archive), 1))
PYTHON
newer genisoimage -quiet -o "$dir/boot.iso" -b isolinux.bin -c boot.cat -no-emul-boot \
  -boot-load-size 4 -boot-info-table "$dir/disc"

for model in "${models[@]}"; do
  read -r cpu rows <<<"$model"
  cat >"$dir/bochsrc" <<RC
display_library: rfb, options="timeout=0"
megs: 512
romimage: file=$dir/root/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$dir/root/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=$cpu, count=1, ips=100000000, reset_on_triple_fault=0
clock: sync=none, time0=local
ata0: enabled=1
ata0-master: type=cdrom, path=$dir/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$dir/serial
log: $dir/log
panic: action=fatal
error: action=ignore
info: action=ignore
RC
  rm -f "$dir/serial"
  LTDL_LIBRARY_PATH=$libraries/bochs/plugins BXSHARE=$dir/root/usr/share/bochs \
    newer bochs-bin -q -f "$dir/bochsrc" >"$dir/output" 2>&1 || true
  tr -d '\r' <"$dir/serial" >"$dir/said"
  grep -a '^row ' "$dir/said" || true
  ran=$(sed -n 's/^row \(\w*\): [0-9]* checks, 0 failures.*/\1/p' "$dir/said" | xargs)
  if [[ $ran != "$rows" ]] || ! grep -qx '@status 0' "$dir/said"; then
    tail -n 40 "$dir/said"
    die "on $cpu the rows '$rows' must pass but got '$ran'"
  fi
  echo "test-bochs: $cpu: $rows"
done
