# Builds and runs Sangam: one static binary in an otherwise empty image.
#
# Configuration: mount a folder with sangam.toml at /etc/sangam, or set DATABASE_NAME,
# MONGODB_LOCAL_URL and MONGODB_CLOUD_URL. State: the volume /var/lib/sangam. The root file system
# may be read-only (`--read-only --tmpfs /run/sangam:uid=10840,gid=10840`).
FROM rust:1.95.0-slim-bookworm AS build
# It has a C compiler, too: SQLite, zstd, ring and jemalloc are compiled from the sources in their crates,
# the last one by make.
RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock ./
COPY config config
COPY src src
COPY benches benches
# Static, so that it needs no system around it. With the target named, the flag leaves build scripts
# and macros alone, which can't be static.
RUN target="$(rustc -vV | sed -n 's/^host: //p')" \
    && RUSTFLAGS="-C target-feature=+crt-static" \
       cargo build --release --locked --bin sangam --target "$target" \
    && install -D "target/$target/release/sangam" /out/usr/bin/sangam \
    && install -d -o 10840 -g 10840 -m 0700 /out/var/lib/sangam \
    && install -d -o 10840 -g 10840 -m 0755 /out/run/sangam /out/etc/sangam

FROM scratch
# Root certificates are compiled in; a private CA is named by tlsCAFile in the URI.
COPY --from=build /out /
LABEL org.opencontainers.image.title="Sangam" \
      org.opencontainers.image.description="Keeps a local MongoDB database and one in the cloud equal, both ways" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10840:10840
WORKDIR /var/lib/sangam
VOLUME /var/lib/sangam
STOPSIGNAL SIGTERM
# Healthy means that the daemon answers and its tasks run; the remote may well be away.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["/usr/bin/sangam", "healthcheck"]
ENTRYPOINT ["/usr/bin/sangam"]
CMD ["run"]
