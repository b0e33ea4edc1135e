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
exec cmake "$@"
