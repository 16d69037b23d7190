# syntax=docker/dockerfile:1
# graftserve's own server for CPU nodes: TensorFlow Serving's protocol in Python, amd64 and arm64.
#
#   docker build -f serving/embedded.Dockerfile -t graftserve .
#   docker run --read-only --tmpfs /tmp --stop-timeout 45 -p 8500:8500 -p 8501:8501 -v "$PWD/models:/models:ro" graftserve \
#     --model_name=flowers --model_base_path=/models/flowers
ARG PYTHON_VERSION=3.12

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends "tini=0.19.*" \
    && rm -rf /var/lib/apt/lists/* \
    && python -m venv /opt/graftserve
WORKDIR /source
# What it depends on has a layer of its own, which changes with pyproject.toml only.
COPY pyproject.toml ./
# What pulls from object stores is in it, too, since init containers do that. EXTRAS=training makes an image that trains.
ARG EXTRAS="serving s3 gcs"
RUN python -c "import sys, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*project['dependencies'], *(line for extra in sys.argv[1].split() for line in project['optional-dependencies'][extra]), sep='\n')" "${EXTRAS}" > /requirements.txt \
    && /opt/graftserve/bin/pip install --no-cache-dir --requirement /requirements.txt
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && /opt/graftserve/bin/pip install --no-cache-dir --no-deps /wheels/graftserve-*.whl \
    && /opt/graftserve/bin/pip check

FROM python:${PYTHON_VERSION}-slim-bookworm

ARG PYTHON_VERSION
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="graftserve: embedded server" \
      org.opencontainers.image.description="Serves SavedModels over gRPC and REST with TensorFlow Serving's protocol" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/python:${PYTHON_VERSION}-slim-bookworm"

COPY --from=build /usr/bin/tini-static /usr/bin/tini
COPY --from=build /opt/graftserve /opt/graftserve
COPY serving/container/models.config serving/container/monitoring.config /etc/serving/

ENV PYTHONUNBUFFERED=1

# A number, so that Kubernetes can see that it is not root.
USER 10001:10001

# gRPC, REST
EXPOSE 8500 8501

# The server answers SIGTERM itself, once TensorFlow is imported. Until then nobody does, and a signal without a handler is
# lost on process 1: a container stopped in its first seconds would have to be killed. Hence tini.
#
# What follows holds for all models; arguments of `docker run` come after it, and the last one of two equal flags wins.
ENTRYPOINT ["/usr/bin/tini", "-e", "143", "--", "/opt/graftserve/bin/graftserve", "serve", \
            "--port=8500", \
            "--rest_api_port=8501", \
            "--monitoring_config_file=/etc/serving/monitoring.config", \
            "--enable_grpc_healthcheck_service=true", \
            "--enable_model_warmup=true"]
# Which models: replaced by the arguments of `docker run`.
CMD ["--model_config_file=/etc/serving/models.config", "--model_config_file_poll_wait_seconds=30"]

# Ports open when the first models are available, so an answer means ready. Not urllib, which would ask a proxy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["/opt/graftserve/bin/python", "-IS", "-c", "import http.client, sys; connection = http.client.HTTPConnection('127.0.0.1', 8501, timeout=4); connection.request('GET', '/monitoring/prometheus/metrics'); sys.exit(connection.getresponse().status != 200)"]
