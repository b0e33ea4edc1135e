#!/usr/bin/env bash
# Installs the Debian packages that a make target needs and that are missing; does nothing if all are there.
#
#   install-tools.sh build|test|bench|gate...
#
# The servers among them are test subjects and must not start: policy-rc.d answers 101 ("forbidden") while
# they are installed, and what was there before is put back, also when the installation fails.
set -euo pipefail

PATH="$PATH:/usr/sbin:/sbin"    # where nginx and haproxy are, and where a user's PATH often ends too early
policy=/usr/sbin/policy-rc.d
kept=$policy.kept-by-forebay

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
        *) command -v "$1" >/dev/null ;;
    esac
}

# Each command is named like the package that brings it, but for those that `has` knows.
commands=()
for purpose in "$@"; do
    case $purpose in
        build) commands+=(clang cmake g++ git libclang-dev) ;;
        test) commands+=(chromium curl dnsmasq-base haproxy nginx openssl pebble prometheus python3 python3-grpcio slowhttptest tmux wrk) ;;
        bench) commands+=(haproxy nginx wrk) ;;
        gate) commands+=(valgrind) ;;
        *) echo "install-tools.sh: unknown purpose '$purpose': build, test, bench or gate" >&2; exit 2 ;;
    esac
done

missing=()
for command in "${commands[@]}"; do
    has "$command" || [[ " ${missing[*]-} " == *" $command "* ]] || missing+=("$command")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "install-tools.sh: please install ${missing[*]}; there is no apt-get here to do it" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ] && ! command -v sudo >/dev/null; then
    echo "install-tools.sh: please install ${missing[*]} as root; there is no sudo here to do it" >&2
    exit 1
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

echo "installing ${missing[*]} (apt-get, nothing is started)"
forbid_starting
as_root apt-get update -qq
as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
