# Sourced: Debian packages without an installation. apt works on a state of its own; nothing of this
# machine's is changed.

die() {
  echo "fusedops: $*" >&2
  exit 1
}

need_debian() {
  local command
  for command in apt-get dpkg-deb; do
    command -v "$command" >/dev/null || die "$command is needed: this works on Debian"
  done
  [[ -n "$(mirror)" ]] || die "apt is configured with no Debian mirror"
}

# The mirror that apt is configured with, and the release of this machine.
mirror() {
  apt-get --print-uris update 2>/dev/null | sed -n "s|^'\\(.*/debian/*\\)dists/.*|\\1|p" | sed -n 1p
}
release() { (. /etc/os-release && echo "$VERSION_CODENAME"); }

# fetch STATE RELEASE ARCHITECTURE STATUS PACKAGE...: into STATE/archives, with what they depend on and
# STATUS (a dpkg status file) does not hold; or "alone".
fetch() {
  local state=$1 suite=$2 arch=$3 status=$4
  shift 4
  rm -rf "$state"
  mkdir -p "$state/lists/partial" "$state/archives/partial"
  : >"$state/empty"
  echo "deb [arch=$arch signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) $suite main" \
    >"$state/sources"
  cat >"$state/conf" <<CONF
APT::Architecture "$arch"; APT::Architectures { "$arch"; };
APT::Install-Recommends "false"; APT::Sandbox::User ""; Acquire::Languages "none"; Acquire::Retries "3";
Debug::NoLocking "true";
Dir::State "$state"; Dir::State::lists "$state/lists"; Dir::Cache "$state";
Dir::State::status "$([[ $status == /* ]] && echo "$status" || echo "$state/empty")";
Dir::Etc::sourcelist "$state/sources"; Dir::Etc::sourceparts "/dev/null"; Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null"; Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
CONF
  # Proxies and certificates of this machine stay in force.
  apt-config dump | grep -E '^Acquire::(http|https)' >>"$state/conf" || true
  export APT_CONFIG=$state/conf
  apt-get update -qq
  if [[ $status == alone ]]; then
    (cd "$state/archives" && apt-get download -qq "$@")
  else
    apt-get install -y -qq --download-only "$@" >/dev/null
  fi
  unset APT_CONFIG
}

# unpack STATE DIR [FILE...]: what was fetched, or these files of it.
unpack() {
  local state=$1 dir=$2 package
  shift 2
  for package in "$state"/archives/*.deb; do
    if (($#)); then
      dpkg-deb --fsys-tarfile "$package" | tar -x -C "$dir" "$@"
    else
      dpkg-deb -x "$package" "$dir"
    fi
  done
  rm -rf "$state"
}
