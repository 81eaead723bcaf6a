# The image of every component: the one binary, with the libraries that it needs and nothing else (no shell either; for
# health checks there is `thalweg health`).
#
#     make image
#     docker build --tag thalweg:0.1.0 --build-arg COMMIT="$(git rev-parse --short=12 HEAD)" .
#
# FEATURES=kubernetes is for autoscalers that scale a Deployment. Without a network for the build, bring the crates along:
#
#     mkdir -p .cargo && cargo vendor --locked > .cargo/config.toml

ARG RUST_VERSION=1.95.0
FROM rust:${RUST_VERSION}-slim-bookworm AS build
WORKDIR /src
COPY . .
ARG COMMIT=
ARG FEATURES=
# Nobody reads line numbers in a stripped binary.
ENV CARGO_PROFILE_RELEASE_DEBUG=none CARGO_PROFILE_RELEASE_STRIP=symbols CARGO_INCREMENTAL=0
RUN THALWEG_COMMIT="$COMMIT" cargo build --locked --release --package thalweg --features "$FEATURES" \
    && install -D target/release/thalweg /image/usr/local/bin/thalweg \
    && rm -rf target
# What the loader would load, who the user is, how names are resolved, and the records by which scanners know the
# libraries' versions.
RUN set -eu; \
    ldd /image/usr/local/bin/thalweg | grep -o '/[^ ]*' | xargs -I{} cp --dereference --parents {} /image; \
    mkdir -p /image/etc/ssl/certs /image/var/lib/dpkg/status.d /empty; \
    for package in libc6 libgcc-s1; do dpkg-query --status "$package" > "/image/var/lib/dpkg/status.d/$package"; done; \
    cp /etc/os-release /image/etc/; \
    if [ -f /etc/ssl/certs/ca-certificates.crt ]; then cp /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/; fi; \
    echo 'hosts: files dns' > /image/etc/nsswitch.conf; \
    echo 'thalweg:x:10001:10001:Thalweg:/var/lib/thalweg:/usr/sbin/nologin' > /image/etc/passwd; \
    echo 'thalweg:x:10001:' > /image/etc/group; \
    mkdir -m 1777 /image/tmp; \
    /image/usr/local/bin/thalweg --version
# By which `docker image prune` finds it, where the builder keeps it.
LABEL thalweg.stage=build

FROM scratch
COPY --from=build /image /
# A volume that is mounted here for the first time takes over its owner. It must not be there before: then it would keep
# the one that it has.
COPY --from=build --chown=10001:10001 /empty /var/lib/thalweg
ARG COMMIT=
ARG VERSION=0.1.0
# Where the sources are published; `make image` takes the clone's origin.
ARG SOURCE=
LABEL org.opencontainers.image.title="Thalweg" \
      org.opencontainers.image.description="Elastic, exactly-once aggregation of gradients" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$COMMIT" \
      org.opencontainers.image.source="$SOURCE" \
      org.opencontainers.image.licenses="Apache-2.0 OR MIT"
ENV PATH=/usr/local/bin
USER 10001:10001
WORKDIR /var/lib/thalweg
EXPOSE 8080 9600
ENTRYPOINT ["/usr/local/bin/thalweg"]
CMD ["--help"]
