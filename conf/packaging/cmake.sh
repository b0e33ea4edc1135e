#!/usr/bin/env bash
# cmake for the build of BoringSSL (`CMAKE` in .cargo/config.toml). `cargo install --path .` does not go by the Makefile, and
# what fails where a package is missing does not name the package. This does, as an error that Cargo shows.
#
# A build script of Forebay's own could not: Cargo runs those of its dependencies first.
set -euo pipefail

missing=$("$(dirname "$0")/install-tools.sh" --missing build)
if [ -n "$missing" ]; then
    echo "cargo::error=to build Forebay, these Debian packages are missing: $missing"
    echo "cargo::error=install them by \`apt-get install --no-install-recommends $missing\`, or let \`make build\` do it"
    exit 1
fi

# BoringSSL computes in C++ what clang compiles well and g++ does not: with g++, a TLS handshake takes a fifth more CPU
# time. An operator's own choice of a compiler, and a build for another machine, stay as they are. valgrind, with which
# `make gate` counts, cannot read the debug information of clang 14, so there is none.
compilers=()
if [ "${CARGO_PKG_NAME-}" = boring-sys ] && [ "${1-}" != --build ] && [ -z "${CC-}${CXX-}" ] &&
    [ "${TARGET-}" = "${HOST-}" ]; then
    compilers=(-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++)
    compilers+=(-DCMAKE_C_FLAGS_RELEASE="-O3 -DNDEBUG -g0" -DCMAKE_CXX_FLAGS_RELEASE="-O3 -DNDEBUG -g0")
fi
exec cmake "$@" "${compilers[@]}"
