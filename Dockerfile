# Builds and runs Sangam. Configuration: mount a folder with sangam.toml at /etc/sangam, or set
# DATABASE_NAME, MONGODB_LOCAL_URL and MONGODB_CLOUD_URL. State: the volume /var/lib/sangam.
FROM rust:1.95.0-slim-bookworm AS build
# SQLite and zstd are compiled from their bundled sources.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Cargo.toml Cargo.lock rust-toolchain.toml ./
COPY config config
COPY src src
COPY benches benches
RUN cargo build --release --locked --bin sangam

FROM debian:12.12-slim
# Root certificates are compiled into the binary; a private CA is named by tlsCAFile in the URI.
RUN useradd --system --uid 10840 --home-dir /var/lib/sangam --shell /usr/sbin/nologin sangam \
    && install -d -o sangam -g sangam -m 0700 /var/lib/sangam \
    && install -d -o sangam -g sangam -m 0755 /run/sangam /etc/sangam
COPY --from=build /src/target/release/sangam /usr/local/bin/sangam
USER sangam
WORKDIR /var/lib/sangam
VOLUME /var/lib/sangam
STOPSIGNAL SIGTERM
# Healthy means that the daemon answers; the remote may well be away.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["sangam", "status"]
ENTRYPOINT ["sangam"]
CMD ["run"]
