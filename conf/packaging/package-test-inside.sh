#!/usr/bin/env bash
# What package-test.sh does inside the Debian that it has booted. The last line is `passed`, or it has failed.
set -euo pipefail
cd "$(dirname "$0")"

step() { echo "== $*"; }
fail() {
    echo "FAILED: $*"
    journalctl --no-pager --lines 30 --unit forebay
    exit 1
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR
expect() { [ "$2" = "$3" ] || fail "$1: expected '$2', found '$3'"; }
owner() { stat -c '%U:%G %a' "$1"; }
# Until a command succeeds: at most half a minute.
within() {
    for _ in $(seq 300); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.1
    done
    fail "not within 30 s: $*"
}
answers() { curl --silent --show-error --fail --max-time 120 "$@"; }
main() { systemctl show --value --property MainPID forebay; }

step "installed: it is enabled and runs"
dpkg -i forebay.deb 2>&1 | tee said
if grep -i -e 'could not' -e error said; then fail "the installation complains"; fi
expect "enabled sockets" "" "$(find /etc/systemd/system -name 'forebay*.socket')"
forebay version
expect "enabled" enabled "$(systemctl is-enabled forebay)"
within systemctl is-active forebay
within forebay healthcheck
answers http://127.0.0.1:8080/ && echo
expect "the user's shell" /usr/sbin/nologin "$(getent passwd forebay | cut -d: -f7)"
expect "the configuration" "root:root 644" "$(owner /etc/forebay/forebay.yaml)"
expect "the state" "forebay:forebay 750" "$(owner /var/lib/forebay)"
expect "the spool" "forebay:forebay 750" "$(owner /var/lib/forebay/spool)"
expect "the logs" "forebay:adm 2750" "$(owner /var/log/forebay)"
forebay check
dpkg --verify forebay
man -w forebay forebay-run forebay.yaml
forebay check -c /usr/share/doc/forebay/examples/canary.yaml
[ -e /usr/share/doc/forebay/manual/first-steps.md ] || fail "the manual is not there"
expect "missing libraries" "" "$(ldd /usr/bin/forebay | grep 'not found' || true)"

step "the sandbox, as it is"
systemd-analyze verify forebay.service
systemd-analyze security --no-pager --threshold=25 forebay.service | tail -n 1
expect "who it is" "$(id -u forebay)" "$(awk '/^Uid/ { print $2 }' "/proc/$(main)/status")"
expect "what it may" 0000000000000400 "$(awk '/^CapEff/ { print $2 }' "/proc/$(main)/status")"
expect "system calls are filtered" 2 "$(awk '/^Seccomp:/ { print $2 }' "/proc/$(main)/status")"
# As many as the unit says, or as this machine lets systemd have.
most=$(awk '/^Max open files/ { print $5 }' /proc/1/limits)
expect "open files" "$((most < 1048576 ? most : 1048576))" "$(awk '/^Max open files/ { print $4 }' "/proc/$(main)/limits")"
# Threads of the disk are as nice as `server.disk_nice` says; the filter of system calls lets them.
nicest=0
for task in /proc/"$(main)"/task/*/stat; do
    nice=$(sed 's/.*) //' "$task" | cut -d ' ' -f 17)
    [ "$nice" -le "$nicest" ] || nicest=$nice
done
expect "the nicest thread" 10 "$nicest"
nsenter --target "$(main)" --mount sh -c '! touch /etc/forebay/x 2>/dev/null && touch /var/lib/forebay/spool/x && rm /var/lib/forebay/spool/x'

step "the log is rotated, and its next lines are in the new one"
log=/var/log/forebay/access.log
within grep -q '"status":200' $log
logrotate --force /etc/logrotate.d/forebay
answers http://127.0.0.1:8080/after >/dev/null
within grep -q /after $log
expect "a log" "forebay:adm 640" "$(owner $log)"
grep -q '"target":"/"' $log.1

step "a wrong configuration: it ends with 78 and is not started again and again"
echo "listenerz: []" >>/etc/forebay/forebay.yaml
systemctl restart forebay || true
within systemctl is-failed forebay
expect "the exit code" 78 "$(systemctl show --value --property ExecMainStatus forebay)"
sleep 3
expect "restarts" 0 "$(systemctl show --value --property NRestarts forebay)"

step "a changed one: it listens on port 80, and holds an upload on disk for its backend"
cat >/etc/forebay/forebay.yaml <<'YAML'
server: { spool_dir: /var/lib/forebay/spool }
listeners: [ { name: web, address: 127.0.0.1:80 } ]
upstreams: { app: { endpoints: [ { address: 127.0.0.1:3000 } ] } }
routes: [ { name: all, upstream: app } ]
observability: { access_log: { path: /var/log/forebay/access.log } }
YAML
systemctl reset-failed forebay
systemctl restart forebay
within forebay healthcheck
forebay origin --listen 127.0.0.1:3000 &
within answers http://127.0.0.1/
expect "what comes back" 3000000 "$(head -c 3000000 /dev/zero | answers --data-binary @- http://127.0.0.1/echo | wc -c)"
within grep '"target":"/echo".*"spilled":[1-9]' $log

step "reloaded: another port, by the same process; a wrong file changes nothing"
before=$(main)
sed -i 's/127.0.0.1:80 /127.0.0.1:81 /' /etc/forebay/forebay.yaml
systemctl reload forebay
answers http://127.0.0.1:81/ >/dev/null
cp /etc/forebay/forebay.yaml right.yaml
echo "listenerz: []" >>/etc/forebay/forebay.yaml
if systemctl reload forebay; then fail "a wrong file was reloaded"; fi
journalctl --no-pager --unit forebay | grep listenerz
cp right.yaml /etc/forebay/forebay.yaml
sed -i 's/127.0.0.1:81 /127.0.0.1:80 /' /etc/forebay/forebay.yaml
systemctl reload forebay
answers http://127.0.0.1/ >/dev/null
expect "the process" "$before" "$(main)"

step "killed: it is started again"
before=$(main)
kill -KILL "$before"
within forebay healthcheck
[ "$(main)" != "$before" ] || fail "it is the same process"

step "hung: the watchdog ends it, and it is started again"
mkdir -p /run/systemd/system/forebay.service.d
printf '[Service]\nWatchdogSec=4\n' >/run/systemd/system/forebay.service.d/test.conf
systemctl daemon-reload
systemctl restart forebay
within forebay healthcheck
before=$(main)
sleep 6
expect "the process that feeds the watchdog" "$before" "$(main)"
kill -STOP "$before"
has_another() { [ "$(main)" != "$before" ] && forebay healthcheck; }
within has_another
journalctl --no-pager --unit forebay | grep -c 'Watchdog timeout'

step "another process of the same program takes over: forebay upgrade"
before=$(main)
forebay upgrade
[ "$(main)" != "$before" ] || fail "systemd still has the old process as the main one"
answers http://127.0.0.1/ >/dev/null
# The new process feeds the watchdog.
before=$(main)
sleep 6
expect "the process that took over" "$before" "$(main)"
rm -r /run/systemd/system/forebay.service.d
systemctl daemon-reload

step "upgraded: the new program takes over without a refused connection, and keeps the changed configuration"
before=$(main)
restarts=$(systemctl show --value --property NRestarts forebay)
touch asking
(while [ -e asking ]; do answers http://127.0.0.1/ >/dev/null 2>>failed || echo failed >>failed; echo >>asked; done) &
asker=$!
dpkg -i --force-confold next.deb 2>&1 | tee said
rm asking
wait "$asker"
wc -l <asked
if grep -i 'could not' said; then fail "the upgrade complains"; fi
expect "what failed" "" "$(cat failed)"
dpkg --status forebay | grep '^Version: .*+next$'
within forebay healthcheck
[ "$(main)" != "$before" ] || fail "the old program still runs"
expect "the program" /usr/bin/forebay "$(readlink "/proc/$(main)/exe")"
expect "restarts" "$restarts" "$(systemctl show --value --property NRestarts forebay)"
[ -e /etc/forebay/forebay.yaml.dpkg-dist ] || fail "the new configuration is not beside the changed one"

step "upgraded with a configuration that the new program refuses: the old one serves on"
before=$(main)
cp /etc/forebay/forebay.yaml right.yaml
echo "listenerz: []" >>/etc/forebay/forebay.yaml
dpkg -i --force-confold next.deb 2>&1 | tee said
grep 'the old one serves on' said
expect "the process" "$before" "$(main)"
answers http://127.0.0.1/ >/dev/null
cp right.yaml /etc/forebay/forebay.yaml

step "upgraded without an admin endpoint: it is restarted"
before=$(main)
sed -i '$a admin: { enabled: false }' /etc/forebay/forebay.yaml
systemctl restart forebay
dpkg -i --force-confold next.deb
[ "$(main)" != "$before" ] || fail "the old program still runs"
within answers http://127.0.0.1/

step "removed: it is stopped, and the configuration stays"
dpkg --remove forebay
expect "active" inactive "$(systemctl is-active forebay || true)"
[ -e /etc/forebay/forebay.yaml ] || fail "removal took the configuration"
[ ! -e /usr/bin/forebay ] || fail "the program is still there"

step "purged: nothing is left but the user"
dpkg --purge forebay
expect "left" "" "$(find /etc /usr /var/lib /var/log /run -name '*forebay*' -not -path '/var/log/journal/*' || true)"
getent passwd forebay

step "the tarball, by the lines of its INSTALL.md"
cd forebay-*/
ldd bin/forebay
bin/forebay version
sed -n 's/^# \([a-z]\)/\1/p' INSTALL.md >lines.sh
grep -c . lines.sh
bash -ex lines.sh
within forebay healthcheck
answers http://127.0.0.1:8080/ && echo

echo passed
