#!/usr/bin/env bash
# Installs, starts, upgrades and purges the package of target/dist in a fresh Debian with a systemd of its own, and tries
# the tarball there.
#
#   package-test.sh [SUITE | FILE.tar]      a suite of Debian, bookworm by default, or a Debian that mmdebstrap made before
#
# As root: the fresh Debian is made by mmdebstrap (some minutes), and systemd-nspawn boots it, with a network of its own
# that ends at its loopback. It takes 700 MB below $TMPDIR, which it removes, and ends after ten minutes of running at most.
set -euo pipefail
cd "$(dirname "$0")/../.."

source=${1:-bookworm}
[ "$(id -u)" -eq 0 ] || { echo "package-test.sh: it boots a Debian of its own: run it as root" >&2; exit 1; }
package=$(find target/dist/debian -name 'forebay_*.deb' 2>/dev/null | head -n 1)
tarball=$(find target/dist -maxdepth 1 -name 'forebay-*.tar.xz' 2>/dev/null | head -n 1)
if [ -z "$package" ] || [ -z "$tarball" ]; then
    echo "package-test.sh: there is no package in target/dist; \`make package\` makes it" >&2
    exit 1
fi

work=$(mktemp -d)
root=$work/root
trap 'rm -rf --one-file-system "$work"' EXIT

case $source in
    *.tar)
        mkdir "$root"
        tar --extract --numeric-owner --directory "$root" --file "$source"
        ;;
    *)
        echo "== a fresh Debian $source"
        mmdebstrap --quiet --variant=minbase --include=systemd,systemd-sysv,logrotate,curl,man-db,ca-certificates "$source" "$root"
        ;;
esac

# The same package as a next version: of another number, and with another configuration.
dpkg-deb --raw-extract "$package" "$work/next"
sed -i 's/^Version: .*/&+next/' "$work/next/DEBIAN/control"
echo "# a line of the next version" >>"$work/next/etc/forebay/forebay.yaml"
(cd "$work/next" && find . -path ./DEBIAN -prune -o -type f -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)

mkdir -p "$root/srv/test"
cp "$package" "$root/srv/test/forebay.deb"
dpkg-deb --root-owner-group --build "$work/next" "$root/srv/test/next.deb" >/dev/null
tar --extract --directory "$root/srv/test" --file "$tarball"
cp conf/packaging/package-test-inside.sh "$root/srv/test/inside.sh"
cat >"$root/etc/systemd/system/package-test.service" <<'UNIT'
[Unit]
After=multi-user.target
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=oneshot
Environment=DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
ExecStart=/bin/bash /srv/test/inside.sh
StandardOutput=file:/srv/test/log
StandardError=inherit
[Install]
WantedBy=default.target
UNIT
systemctl --root="$root" --quiet enable package-test.service
: >"$root/srv/test/log"
tail --lines=+1 --follow "$root/srv/test/log" &
follower=$!
timeout --signal=TERM --kill-after=30 600 systemd-nspawn --quiet --directory="$root" --machine="forebay-$$" --boot \
    --register=no --keep-unit --private-network --console=pipe >"$work/console" 2>&1 </dev/null || true
sleep 1
kill "$follower"
if ! grep -q '^passed$' "$root/srv/test/log"; then
    tail -n 20 "$work/console" >&2
    echo "package-test.sh: it failed" >&2
    exit 1
fi
