# The image of Forebay: `docker build -t forebay .`
#
# The program is built with LTO, without PGO. With BUILD=release it has both, and the build takes twice as long.
ARG RUST=1.95
FROM rust:${RUST}-slim-bookworm AS build
ARG BUILD=build
WORKDIR /src
# The packages first: they stay in the cache while the source changes.
COPY conf/packaging/install-tools.sh conf/packaging/tools-release.txt conf/packaging/
RUN conf/packaging/install-tools.sh build release
COPY . .
RUN make "${BUILD}" \
    && case "${BUILD}" in release) program=target/dist/release/forebay ;; *) program=target/release/forebay ;; esac \
    && install -D -m 755 "${program}" /image/usr/bin/forebay \
    && strip /image/usr/bin/forebay \
    && install -D -m 644 conf/packaging/container.yaml /image/etc/forebay/forebay.yaml \
    && install -d -m 750 -o 10001 -g 10001 /image/var/lib/forebay /image/var/lib/forebay/spool

FROM debian:bookworm-slim
# A number, so that Kubernetes can see that it is not root (runAsNonRoot).
RUN groupadd --gid 10001 forebay \
    && useradd --no-log-init --uid 10001 --gid 10001 --home-dir /var/lib/forebay --no-create-home --shell /usr/sbin/nologin forebay
# The authorities that upstreams over TLS and issuers of certificates are trusted by.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /image/ /
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=4s --start-period=10s --retries=3 CMD ["forebay", "healthcheck"]
ENTRYPOINT ["forebay"]
CMD ["run"]
