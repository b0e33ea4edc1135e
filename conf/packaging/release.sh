#!/usr/bin/env bash
# Builds target/dist/release/forebay: with LTO over all crates, and with a profile of its own (PGO).
#
# It builds twice, first with counters, and then, after half a minute of training, with what they counted. Both builds
# share one directory, so that BoringSSL is compiled once.
#
#   FOREBAY_PGO=off     builds once and does not train
#   FOREBAY_TRAIN=10    seconds for each of the nine kinds of load; 4 by default
set -euo pipefail
cd "$(dirname "$0")/../.."

host=$(rustc -vV | sed -n 's/^host: //p')
work=$PWD/target/pgo
profile=$work/forebay.profdata
export CARGO_TARGET_DIR=$work/build
export RUSTC_WRAPPER=$PWD/conf/packaging/pgo-rustc.sh
export FOREBAY_RUSTC_OUT=$CARGO_TARGET_DIR/$host/release/deps
built=$CARGO_TARGET_DIR/$host/release/forebay

# libstdc++, of which BoringSSL needs little, becomes a part of the program. What is left is glibc and libgcc_s.
export BORING_BSSL_RUST_CPPLIB=static=stdc++
cpp=$(dirname "$(g++ -print-file-name=libstdc++.a)")

# Cargo does not see that the flags of the wrapper changed. Without these files it compiles the crates of the program
# again, and keeps what was made for build scripts, and what these made. A build that was ended goes on where it was.
forget_crates_of_other_flags() {
    local flags=$1 known=$CARGO_TARGET_DIR/$host/release/.fingerprint kept=$CARGO_TARGET_DIR/flags
    [ "$flags" != "$(cat "$kept" 2>/dev/null)" ] || return 0
    [ ! -d "$known" ] || find "$known" -type f \( -name '*lib-*' -o -name '*bin-*' \) -delete
    mkdir -p "$CARGO_TARGET_DIR"
    echo "$flags" >"$kept"
}

build() {
    local flags="-Lnative=$cpp $*"
    forget_crates_of_other_flags "$flags $(sha256sum "$profile" 2>/dev/null || echo untrained)"
    FOREBAY_RUSTC_FLAGS=$flags cargo build --locked --release --target "$host" --bin forebay
}

keep() {
    mkdir -p target/dist/release
    cp "$built" target/dist/release/forebay
    echo "target/dist/release/forebay is built: $(du -h target/dist/release/forebay | cut -f1), needs" \
        "$(readelf -d "$built" | sed -n 's/.*NEEDED.*\[\(.*\)\]/\1/p' | tr '\n' ' ')"
}

if [ "${FOREBAY_PGO-on}" = off ]; then
    build
    keep
    exit
fi

profdata=$(find "$(conf/packaging/install-tools.sh --directory release)" -path '*/llvm/bin/llvm-profdata' | head -n 1)
[ -x "$profdata" ] || { echo "release.sh: there is no llvm-profdata; \`conf/packaging/install-tools.sh release\` installs it" >&2; exit 1; }
rm -rf "$work/counts" "$profile"
echo "1 of 3: building with counters"
build "-Cprofile-generate=$work/counts -Cllvm-args=-enable-name-compression=false"
echo "2 of 3: training"
conf/packaging/train.sh "$built" "$work/counts" "${FOREBAY_TRAIN-4}"
"$profdata" merge --output "$profile" "$work/counts"
"$profdata" show "$profile" | head -n 4
echo "3 of 3: building with the profile"
build "-Cprofile-use=$profile"

# A profile of functions with other names is taken without a word, and does nothing.
"$profdata" show --all-functions "$profile" | sed -n 's/^  \([^ ].*\):$/\1/p' | sed 's/.*[;:]//' | sort -u >"$work/trained"
nm "$built" | awk '{ print $NF }' | sort -u >"$work/built"
known=$(comm -12 "$work/trained" "$work/built" | wc -l)
[ "$known" -ge 1000 ] || { echo "release.sh: the profile knows $known functions of the program: it was of no use" >&2; exit 1; }
echo "the profile knows $known of $(wc -l <"$work/built") symbols"
keep
