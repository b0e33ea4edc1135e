#!/usr/bin/env bash
# Makes the Debian package and the tarball of target/dist/release/forebay, or of the PROGRAM that is named, in target/dist.
#
#   package.sh [PROGRAM]
set -euo pipefail
cd "$(dirname "$0")/../.."

dist=target/dist
program=$dist/release/forebay
if [ $# -gt 0 ]; then
    mkdir -p $dist/release
    cp "$1" $program
fi
[ -x $program ] || { echo "package.sh: there is no $program; \`make release\` builds it" >&2; exit 1; }

# Shared libraries that every Debian has. One more would be a dependency that somebody must know of.
needed=$(readelf -d $program | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p')
for library in $needed; do
    case $library in
        libc.so.6 | libm.so.6 | libgcc_s.so.1 | ld-linux-*) ;;
        # A program that `make release` did not build has it.
        libstdc++.so.6) echo "package.sh: note: $program needs $library" ;;
        *) echo "package.sh: $program needs $library, which was not expected" >&2; exit 1 ;;
    esac
done
glibc=$(readelf --version-info $program | grep -o 'GLIBC_[0-9.]*' | sort --version-sort | tail -n 1)

rm -rf $dist/man $dist/completions $dist/manual $dist/debian
$program man $dist/man
mkdir -p $dist/completions
$program completions bash >$dist/completions/forebay.bash
$program completions zsh >$dist/completions/_forebay
$program completions fish >$dist/completions/forebay.fish
gzip --best --no-name --stdout CHANGELOG.md >$dist/changelog.gz
mkdir -p $dist/manual
for page in conf/manual/*.md; do
    sed -f conf/packaging/manual.sed "$page" >"$dist/manual/$(basename "$page")"
done

# It takes the program from target/dist/release, where release.sh has put it.
CARGO_TARGET_DIR=$dist cargo deb --quiet --no-build --dbgsym --compress-debug-symbols
version=$($program version | cut -d ' ' -f 2)
tree=forebay-$version-$(uname -m)-linux
rm -rf "${dist:?}/$tree"
install -D -m 755 $program "$dist/$tree/bin/forebay"
strip "$dist/$tree/bin/forebay"
install -D -m 644 -t "$dist/$tree/share/man/man1" $dist/man/*.1
install -D -m 644 -t "$dist/$tree/share/man/man5" $dist/man/*.5
install -D -m 644 $dist/completions/forebay.bash "$dist/$tree/share/bash-completion/completions/forebay"
install -D -m 644 -t "$dist/$tree/share/zsh/site-functions" $dist/completions/_forebay
install -D -m 644 -t "$dist/$tree/share/fish/vendor_completions.d" $dist/completions/forebay.fish
install -D -m 644 -t "$dist/$tree/etc" conf/packaging/forebay.yaml conf/full.yaml \
  conf/forebay.schema.json
sed -i '1s#/usr/share/forebay/##' "$dist/$tree/etc/forebay.yaml"
install -D -m 644 -t "$dist/$tree/system" conf/packaging/forebay.{service,sysusers,tmpfile,logrotate} conf/examples/forebay.socket
install -m 644 -t "$dist/$tree" LICENSE
sed -e "s/@LIBRARIES@/$(echo "$needed" | paste -sd ' ')/" -e "s/@GLIBC@/$glibc/" conf/packaging/tarball.md >"$dist/$tree/INSTALL.md"
# The same tree makes the same bytes.
tar --create --sort=name --owner=0 --group=0 --numeric-owner --mtime="@${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}" \
    --directory $dist "$tree" | xz -6 --threads=0 >"$dist/$tree.tar.xz"
rm -rf "${dist:?}/$tree"

if command -v lintian >/dev/null; then
    lintian --allow-root --fail-on error,warning --tag-display-limit 0 $dist/debian/*.deb
fi
echo "made of $program, which needs $(echo "$needed" | paste -sd ' ') and $glibc:"
ls -sh $dist/debian/*deb "$dist/$tree.tar.xz"
