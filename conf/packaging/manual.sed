# Links of the manual to files of this tree, as they are in /usr/share/doc/forebay/manual.
s#\](\.\./\.\./tests/bench/README\.md#](../benchmarks.md#g
s#\](\.\./\.\./CHANGELOG\.md#](../changelog.gz#g
s#\](\.\./\.\./dashboards/#](../dashboards/#g
