#!/usr/bin/env bash
# Trains a Forebay that was built with counters: train.sh PROGRAM DIRECTORY SECONDS
#
# Nine kinds of load, SECONDS each, over loopback: usual requests, a route with rules, and each protocol once. The
# backend is the test origin of the same program; its counts are discarded.
set -euo pipefail

program=$1 counts=$2 seconds=$3
work=$(mktemp -d)
mkdir -p "$counts"
processes=()
finish() {
    [ ${#processes[@]} -eq 0 ] || kill -KILL "${processes[@]}" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost -keyout "$work/key.pem" -out "$work/cert.pem" 2>/dev/null

# Prints the address behind a word of a file, once it is there.
address_in() {
    local file=$1 pattern=$2 found
    for _ in $(seq 200); do
        found=$(sed -n "s|$pattern|\1|p" "$file" | head -n 1)
        if [ -n "$found" ]; then echo "$found"; return; fi
        sleep 0.1
    done
    echo "train.sh: nothing listens after 20 seconds; $file has:" >&2
    cat "$file" >&2
    return 1
}

LLVM_PROFILE_FILE=$work/origin.profraw "$program" origin --listen 127.0.0.1:0 >"$work/origin.log" 2>&1 &
processes+=($!)
origin=$(address_in "$work/origin.log" '.*listens on http://\([0-9.:]*\);.*')

cat >"$work/forebay.yaml" <<YAML
server: { spool_dir: $work, shutdown: { pause: 0s, deadline: 5s } }
listeners:
  - { name: web, address: 127.0.0.1:0, protocols: [http1, h2c] }
  - { name: tls, address: 127.0.0.1:0, tls: { certificates: [ { cert: $work/cert.pem, key: $work/key.pem } ], default: localhost } }
upstreams: { origin: { endpoints: [ { address: $origin } ] } }
routes:
  - name: rules
    match: { path: { prefix: /bytes/129 }, when: '!("x-admin" in request.headers) && request.host != "admin.test"' }
    filters:
      - { headers: { request: { remove: [ X-Bot ] } }, when: 'request.headers["user-agent"].matches("(?i)scrapy|headless")' }
      - { headers: { request: { remove: [ X-User ] } }, when: 'request.path.startsWith("/api/") && request.headers["x-user"] != ""' }
      - { headers: { request: { remove: [ X-Beta ] } }, when: 'request.cookies["beta"] == "1" || request.args["debug"] == "1"' }
      - { headers: { request: { remove: [ X-Put ] } }, when: 'request.method in ["PUT", "DELETE"] || cidr("10.0.0.0/8").containsIP(source.address)' }
    upstream: origin
  - { name: api, match: { path: { prefix: /headers } }, filters: [ { request_id: {} } ], upstream: origin }
  - { name: all, upstream: origin }
admin: { address: 127.0.0.1:0 }
observability: { access_log: { path: $work/access.log } }
YAML
LLVM_PROFILE_FILE=$counts/%p.profraw "$program" run -c "$work/forebay.yaml" >"$work/forebay.log" 2>&1 &
gateway=$!
processes+=("$gateway")
web=$(address_in "$work/forebay.log" '.*listener="web" address="\{0,1\}\([0-9.:]*\).*')
tls=$(address_in "$work/forebay.log" '.*listener="tls" address="\{0,1\}\([0-9.:]*\).*')

echo 'wrk.method = "POST" wrk.body = string.rep("x", 65536)' >"$work/post.lua"
load() {
    echo "  $*"
    "$@" >"$work/load.log" 2>&1 || { cat "$work/load.log" >&2; return 1; }
}
load wrk -t1 -c64 -d"${seconds}s" "http://$web/bytes/128"
load wrk -t1 -c64 -d"${seconds}s" "http://$web/headers?page=2"
load wrk -t1 -c64 -d"${seconds}s" -H "Cookie: theme=dark" "http://$web/bytes/129"
load wrk -t1 -c16 -d"${seconds}s" -H "Connection: close" "http://$web/bytes/128"
load wrk -t1 -c32 -d"${seconds}s" "http://$web/bytes/64KiB"
load wrk -t1 -c16 -d"${seconds}s" "http://$web/chunked/1MiB"
load wrk -t1 -c16 -d"${seconds}s" -s "$work/post.lua" "http://$web/echo"
load h2load -t1 -c8 -m16 -D"$seconds" "http://$web/bytes/128"
load h2load -t1 -c8 -m16 -D"$seconds" "https://localhost:${tls##*:}/bytes/128"

# The counts are written as the process ends.
kill -TERM "$gateway"
for _ in $(seq 300); do
    kill -0 "$gateway" 2>/dev/null || break
    sleep 0.1
done
if kill -0 "$gateway" 2>/dev/null; then echo "train.sh: the gateway did not end within 30 seconds" >&2; exit 1; fi
served=$(wc -l <"$work/access.log")
[ "$served" -ge 1000 ] || { echo "train.sh: $served exchanges are too few to learn from" >&2; exit 1; }
echo "  $served exchanges"
