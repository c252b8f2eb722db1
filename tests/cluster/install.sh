#!/usr/bin/env bash
# Installs what a bare Debian 12 with Rust, Go and Python lacks to build, test and run the demo: Debian packages, and the
# Rust components that the checks use. Needs root. Silent when everything is there; never starts a service.
set -euo pipefail
# shellcheck source=tests/cluster/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PACKAGES=(
    # to build: C++ for libtorch's bindings, tools of trainer-image/libtorch.sh
    binutils g++ make unzip
    # the cluster
    etcd-server containerd runc containernetworking-plugins iptables ipset nftables conntrack iproute2 procps openssl curl
    # images
    buildah debootstrap tini
    # tests and checks
    prometheus shellcheck python3-yaml lua5.4
)

missing=()
for package in "${PACKAGES[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null)" = installed ] || missing+=("$package")
done
python3 -m pip --version > /dev/null 2>&1 || missing+=(python3-pip)
python3 -m venv --help > /dev/null 2>&1 || missing+=(python3-venv)

if [ ${#missing[@]} -gt 0 ]; then
    need_root
    say "Debian packages: ${missing[*]}"
    # Packages start their services when they are installed; the tests start their own. This is Debian's way to say so.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        trap 'rm -f '"$policy" EXIT
        printf '#!/bin/sh\nexit 101\n' > $policy
        chmod +x $policy
    fi
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends "${missing[@]}"; } > "$log" 2>&1; then
        tail -n 20 "$log" >&2
        die "apt-get could not install them; its last lines are above, all of them in $log"
    fi
    rm -f "$log"
fi

command -v cargo > /dev/null || die "cargo is missing: install Rust 1.95 or newer"
command -v go > /dev/null || die "go is missing: install Go 1.26 or newer"
for component in rustfmt clippy; do
    if ! cargo "${component/rust/}" --version > /dev/null 2>&1; then
        say "Rust component: $component"
        rustup component add "$component" || die "cargo has no $component and rustup could not add it; install it and run again"
    fi
done
