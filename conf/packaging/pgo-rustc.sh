#!/usr/bin/env bash
# The RUSTC_WRAPPER of release.sh: adds $FOREBAY_RUSTC_FLAGS where code for the program itself is compiled.
#
# RUSTFLAGS would not do. Cargo makes them a part of every crate's identity, so that the names of functions in the trained
# build would not be those in the profile. And build scripts, procedural macros and what build scripts probe are left
# alone: of all calls, only those for the program write into the directory that $FOREBAY_RUSTC_OUT names.
set -euo pipefail

rustc=$1
shift
case " $* " in
    *" --out-dir $FOREBAY_RUSTC_OUT "*)
        read -ra flags <<<"$FOREBAY_RUSTC_FLAGS"
        exec "$rustc" "$@" "${flags[@]}"
        ;;
    *) exec "$rustc" "$@" ;;
esac
