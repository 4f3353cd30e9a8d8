# Trains on a GPU; the host needs an NVIDIA driver and the NVIDIA Container Toolkit, no CUDA:
#   docker build -t tdmpc2-jax .
#   mkdir -p runs
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD/runs:/app/runs" -v tdmpc2-jax-cache:/cache tdmpc2-jax \
#     --task walker-walk
# Without --gpus all it runs on the CPU. A stopped run goes on with the same command and --resume. The volume
# tdmpc2-jax-cache keeps compiled programs, so that the next container does not compile them again.

# not -slim alone: the names of the Mesa packages below are those of bookworm
FROM python:3.12-slim-bookworm

# software rendering for --capture-video; on a GPU the driver's own EGL is used
RUN apt-get update \
    && apt-get install -y --no-install-recommends libosmesa6 libegl1 libgl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

RUN pip install --no-cache-dir uv
ENV UV_SYSTEM_PYTHON=1 \
    UV_LINK_MODE=copy

# dependencies first: an edit of the source installs none of them again
WORKDIR /app
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/uv uv pip install -r pyproject.toml --extra cuda -c constraints.txt
COPY . .
RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-deps -e .

# any user may run it: runs/ and the compiled programs in /cache are writable, and what libraries cache goes to /tmp
RUN mkdir -p runs /cache && chmod 777 runs /cache
ENV HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
VOLUME ["/app/runs", "/cache"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "tdmpc2_jax.py"]
