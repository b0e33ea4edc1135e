#!/usr/bin/env bash
# Installs what a make target needs and what is missing: Debian packages, and a few tools of PyPI and crates.io. It does
# nothing if all are there.
#
#   install-tools.sh build|test|manual|bench|gate|release|package|package-test...
#   install-tools.sh --missing build...             prints the Debian packages that are missing, and installs none
#   install-tools.sh --directory test|manual|release  prints where the tools of PyPI are
#
# Tools of PyPI are in a virtual environment of their own, in $FOREBAY_TOOLS, else in ~/.cache/forebay/tools.
#
# The servers among them are test subjects and must not start: policy-rc.d answers 101 ("forbidden") while
# they are installed, and what was there before is put back, also when the installation fails.
set -euo pipefail

PATH="$PATH:/usr/sbin:/sbin"    # where nginx and haproxy are, and where a user's PATH often ends too early
policy=/usr/sbin/policy-rc.d
kept=$policy.kept-by-forebay
here=$(cd "$(dirname "$0")" && pwd)
tools=${FOREBAY_TOOLS:-${XDG_CACHE_HOME:-${HOME:-/var/tmp}/.cache}/forebay/tools}

if [ "${1-}" = --directory ]; then
    echo "$tools/$2"
    exit
fi
only_missing=
if [ "${1-}" = --missing ]; then
    only_missing=yes
    shift
fi

as_root() {
    if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo "$@"; fi
}

# BoringSSL is C++ that cmake configures and git patches; its bindings are made by libclang.
has() {
    case $1 in
        dnsmasq-base) command -v dnsmasq >/dev/null ;;
        libclang-dev) compgen -G '/usr/lib/llvm-*/lib/libclang.so*' >/dev/null && compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h' >/dev/null ;;
        # Debian's Python has Debian's modules, whatever other one is first in PATH.
        python3-grpcio) /usr/bin/python3 -c 'import grpc' 2>/dev/null ;;
        python3-venv) /usr/bin/python3 -c 'import ensurepip' 2>/dev/null ;;
        binutils) command -v readelf >/dev/null ;;
        dpkg-dev) command -v dpkg-shlibdeps >/dev/null ;;
        groff-base) command -v groff >/dev/null ;;
        systemd-container) command -v systemd-nspawn >/dev/null ;;
        nghttp2-client) command -v h2load >/dev/null ;;
        systemd) command -v systemd-analyze >/dev/null ;;
        xz-utils) command -v xz >/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

# Each command is named like the package that brings it, but for those that `has` knows.
commands=()
environments=()
crates=()
for purpose in "$@"; do
    case $purpose in
        build) commands+=(clang cmake g++ git libclang-dev make) ;;
        test)
            commands+=(chromium curl dnsmasq-base haproxy nginx openssl pebble prometheus python3 python3-grpcio slowhttptest tmux wrk)
            commands+=(groff-base python3-venv shellcheck systemd)
            environments+=(test manual)
            ;;
        manual) commands+=(python3 python3-venv); environments+=(manual) ;;
        bench) commands+=(haproxy nginx nghttp2-client openssl slowhttptest wrk) ;;
        gate) commands+=(valgrind) ;;
        release) commands+=(binutils nghttp2-client openssl python3-venv wrk); environments+=(release) ;;
        package) commands+=(binutils dpkg-dev lintian xz-utils); crates+=(cargo-deb@3.8.0) ;;
        package-test) commands+=(mmdebstrap systemd-container) ;;
        *) echo "install-tools.sh: unknown purpose '$purpose': build, test, manual, bench, gate, release, package or package-test" >&2; exit 2 ;;
    esac
done

missing=()
for command in "${commands[@]}"; do
    has "$command" || [[ " ${missing[*]-} " == *" $command "* ]] || missing+=("$command")
done
if [ -n "$only_missing" ]; then
    echo "${missing[*]}"
    exit
fi

restore_policy() {
    as_root rm -f "$policy"
    if [ -e "$kept" ]; then as_root mv "$kept" "$policy"; fi
}

forbid_starting() {
    # A kept one that is still there is from a run that was killed; the policy beside it is ours then.
    if [ -e "$policy" ] && [ ! -e "$kept" ]; then as_root mv "$policy" "$kept"; fi
    trap restore_policy EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
}

install_packages() {
    if ! command -v apt-get >/dev/null; then
        echo "install-tools.sh: please install ${missing[*]}; there is no apt-get here to do it" >&2
        exit 1
    fi
    if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
        echo "install-tools.sh: please install ${missing[*]} as root; there is no sudo here to do it" >&2
        exit 1
    fi

    echo "installing ${missing[*]} (apt-get, nothing is started)"
    forbid_starting
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# The virtual environment `tools/PURPOSE`, made anew when its list has changed. The copy of the list comes last: without
# it, the environment of a run that was ended half-way is not taken for a whole one.
install_environment() {
    local purpose=$1 list=$here/tools-$1.txt place=$tools/$1
    mkdir -p "$tools"
    exec 9>"$tools/.lock"
    flock 9
    if ! cmp -s "$list" "$place/list.txt"; then
        echo "installing $(grep -v '^#' "$list" | tr '\n' ' ')(PyPI, into $place)"
        rm -rf "$place"
        /usr/bin/python3 -m venv "$place"
        "$place/bin/pip" install --quiet --disable-pip-version-check --requirement "$list"
        cp "$list" "$place/list.txt"
    fi
    exec 9>&-
}

install_crate() {
    local name=${1%@*} version=${1#*@}
    command -v "$name" >/dev/null || cargo install --quiet --locked --version "$version" "$name"
}

[ ${#missing[@]} -eq 0 ] || install_packages
for purpose in "${environments[@]}"; do install_environment "$purpose"; done
for crate in "${crates[@]}"; do install_crate "$crate"; done
