# Images with the command `skymask-gpu`, for a CPU or for CUDA.
#
#     docker build --target cpu -t skymask-gpu:cpu .
#     docker build --target cuda -t skymask-gpu:cuda .
#     docker run --rm skymask-gpu:cpu info
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" skymask-gpu:cpu run examples/demo.toml --out demo-out
#     docker run --rm --gpus all skymask-gpu:cuda info
#
# NOT BUILT: no machine with a Docker daemon was at hand when this file was written, so neither target has been tried.
ARG PYTHON=3.11
ARG TORCH=2.13.0

# The wheel, from the files that .dockerignore lets through.
FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
RUN pip install --no-cache-dir "build>=1.2"
COPY . .
RUN python -m build --wheel --outdir /wheels

# No CUDA libraries: PyTorch's own index has a build for CPUs alone.
FROM python:${PYTHON}-slim AS cpu
ARG TORCH
RUN pip install --no-cache-dir "torch==${TORCH}" --index-url https://download.pytorch.org/whl/cpu
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[run,data]" && useradd --create-home skymask \
    && mkdir -m 1777 /cache
USER skymask
WORKDIR /work
# Compiled kernels are cached beside the package or at home by default, where no user that --user names may write;
# every user may write to /cache.
ENV NUMBA_CACHE_DIR=/cache/numba MPLCONFIGDIR=/cache/matplotlib
ENTRYPOINT ["skymask-gpu"]
CMD ["--help"]

# The CUDA libraries come with torch's default build for Linux; Triton needs a C compiler for its launchers.
FROM python:${PYTHON}-slim AS cuda
ARG TORCH
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && pip install --no-cache-dir "torch==${TORCH}"
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[run,data]" && useradd --create-home skymask \
    && mkdir -m 1777 /cache
USER skymask
WORKDIR /work
ENV NUMBA_CACHE_DIR=/cache/numba MPLCONFIGDIR=/cache/matplotlib TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["skymask-gpu"]
CMD ["--help"]
