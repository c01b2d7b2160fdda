# syntax=docker/dockerfile:1
# The gateway as an image: a virtual environment on any base that has python3 >= 3.11.
#
#   BASE       where it is built and where it runs: both need the same Python. Pin it by digest for a release:
#              python:3.13-slim@sha256:…
#   EXTRAS     frameworks, stores, grpc and jwt, by the names of the extras in pyproject.toml: sklearn,xgboost,s3,…
#   PACKAGES   more for pip: what models of your own import
#   VERSION, REVISION, CREATED   for the labels
#   --secret id=pip.conf   pip's configuration, for an index or proxy of your own
#   --secret id=ca         a certificate, named in that file as /run/secrets/ca
# Neither secret becomes part of the image. /opt/gateway/sbom.cdx.json (CycloneDX) lists the Python packages in it.
ARG BASE=python:3.13-slim

FROM ${BASE} AS build
# A bare Debian has no venv. Nothing of this stage but /opt/gateway is kept, so its version does not matter.
# hadolint ignore=DL3008
RUN python3 -c 'import ensurepip' 2>/dev/null \
    || { apt-get update && apt-get install --yes --no-install-recommends python3-venv; }
# pip stays outside of the environment that it fills.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/gateway
COPY pyproject.toml README.md LICENSE /src/
COPY gateway /src/gateway
COPY loaders /src/loaders
ARG EXTRAS=sklearn
ARG PACKAGES=
# hadolint ignore=SC2086
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca --mount=type=cache,target=/root/.cache/pip \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    /opt/pip/bin/python -m pip --python /opt/gateway/bin/python --disable-pip-version-check \
    install --only-binary :all: "/src[${EXTRAS}]" ${PACKAGES}
# The list of what was installed. The tool that writes it stays in this stage.
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca --mount=type=cache,target=/root/.cache/pip \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    /opt/pip/bin/python -m pip --disable-pip-version-check install --only-binary :all: cyclonedx-bom==7.5.0 \
    && /opt/pip/bin/cyclonedx-py environment --output-reproducible \
        --output-file /opt/gateway/sbom.cdx.json /opt/gateway/bin/python

FROM ${BASE}
ARG BASE
# The user needs a name: frameworks look it up.
RUN groupadd --gid 10001 gateway \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/gateway --no-create-home --shell /usr/sbin/nologin gateway \
    && install --directory --owner=10001 --group=10001 /var/lib/gateway \
    && install --directory /etc/gateway
COPY --from=build /opt/gateway /opt/gateway
# What it writes goes to /var/lib/gateway and, while models run, to /tmp: the rest may be read-only.
ENV PATH=/opt/gateway/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/var/lib/gateway \
    XDG_CACHE_HOME=/var/lib/gateway/cache \
    XDG_STATE_HOME=/var/lib/gateway/state \
    GATEWAY_HOST=0.0.0.0
VOLUME /var/lib/gateway
# Where gateway.yaml and registry.yaml are looked for.
WORKDIR /etc/gateway
USER 10001:10001
EXPOSE 8080
# The port may also be what Kubernetes injects for a Service named gateway: tcp://…
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["python3", "-c", "\
import os, urllib.request as r; \
p = os.environ.get('GATEWAY_PORT', ''); \
r.urlopen(f\"http://127.0.0.1:{p if p.isdigit() else 8080}/livez\", timeout=2)"]
# SageMaker adds the argument `serve`, Vertex AI sets AIP_HTTP_PORT.
ENTRYPOINT ["gateway", "serve"]
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="model-gateway" \
      org.opencontainers.image.description="Turns a model registry into a prediction service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
