# Trains on a GPU; the host needs an NVIDIA driver and the NVIDIA Container Toolkit, no CUDA:
#   docker build -t tdmpc2-jax .
#   mkdir -p runs
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD/runs:/app/runs" tdmpc2-jax --task walker-walk
# Without --gpus all it runs on the CPU. A stopped run goes on with the same command and --resume.

# not -slim alone: the names of the Mesa packages below are those of bookworm
FROM python:3.12-slim-bookworm

# software rendering for --capture-video; on a GPU the driver's own EGL is used
RUN apt-get update \
    && apt-get install -y --no-install-recommends libosmesa6 libegl1 libgl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip install -e '.[cuda]'

# any user may run it: runs/ is writable, and what libraries cache goes to /tmp
RUN mkdir -p runs && chmod 777 runs
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
VOLUME /app/runs
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "tdmpc2_jax.py"]
