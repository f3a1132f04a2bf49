# Workers for Dask clusters, and the command itself:
#   docker build -t stcln-geo:0.1.0 .
#   docker run -e DASK_SCHEDULER_ADDRESS=tcp://host:8786 stcln-geo:0.1.0
# For GPUs, take the CUDA build of torch: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
FROM python:3.11-slim AS build

# Where torch comes from: its CPU build, or a CUDA build.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/stcln-geo
WORKDIR /src

# Dependencies change less often than the code: this layer is kept between builds.
COPY constraints.txt ./
RUN torch=$(grep '^torch==' constraints.txt) \
    && /opt/stcln-geo/bin/pip install --index-url "$TORCH_INDEX" "$torch"

COPY pyproject.toml README.md LICENSE ./
COPY stcln_geo ./stcln_geo
COPY cli ./cli
COPY catalogs ./catalogs
RUN /opt/stcln-geo/bin/pip install -c constraints.txt ".[s3]"

FROM python:3.11-slim

# The version of the package; the build fails where it is another.
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="stcln-geo" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="Apache-2.0"

# GDAL in rasterio's wheel wants this library from the system.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libexpat1 \
    && rm -rf /var/lib/apt/lists/*

COPY --from=build /opt/stcln-geo /opt/stcln-geo
ENV PATH=/opt/stcln-geo/bin:$PATH PYTHONUNBUFFERED=1
# As local workers have it: fewer gaps in memory, and no profile that nobody reads.
ENV MALLOC_ARENA_MAX=2 DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False
RUN test "$(stcln-geo --version)" = "stcln-geo ${VERSION}"

# Shared volumes must be writable for this user or its group.
RUN useradd --uid 1000 --create-home stcln
USER stcln
WORKDIR /home/stcln

# The scheduler's address comes from DASK_SCHEDULER_ADDRESS. No entry point, so that the same image
# runs 'dask scheduler' and 'stcln-geo'.
CMD ["dask", "worker", "--nworkers", "1", "--nthreads", "1", "--no-dashboard", "--death-timeout", "60"]
