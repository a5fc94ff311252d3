# vLLM's own image with asl_vllm in it, run as a user that is not root.
#
#     docker build -t asl-vllm:0.2.0 .
#     docker run --gpus all --shm-size 8g -p 8000:8000 -v asl-cache:/cache \
#         asl-vllm:0.2.0 Qwen/Qwen3-8B --kv-policy asl

# The wheel is built apart: neither the sources nor pip's leavings reach the image.
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY asl_vllm asl_vllm
COPY kernels kernels
COPY server server
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# A release of a line that asl_vllm works with (asl_vllm/engine/lines.py).
FROM vllm/vllm-openai:v0.32.0

# --no-deps: vLLM, torch and all else are the base image's. The check ends the build
# where vLLM would not find the plugin.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps --no-index /wheels/*.whl \
    && python3 -c "from importlib.metadata import entry_points as e; e(group='vllm.general_plugins')['asl_vllm'].load()"

# Group 0 and its write permission: OpenShift runs images under a user id of its own
# choice, always in this group.
RUN useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home asl \
    && mkdir -p /cache/huggingface \
    && chown -R 10001:0 /cache \
    && chmod -R g=u /cache

# Weights, compiled graphs and kernels outlive the container if /cache is a volume. The
# home is the volume itself: a folder of the image below it may be hidden by a mount.
ENV HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    VLLM_CACHE_ROOT=/cache/vllm \
    VLLM_CONFIG_ROOT=/cache/vllm-config \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    VLLM_NO_USAGE_STATS=1 \
    HEALTH_URL=http://127.0.0.1:8000/health
VOLUME ["/cache"]

USER 10001
WORKDIR /cache
EXPOSE 8000

# Loading a large model takes minutes; after that the answer is at once. 503: the engine
# is dead.
HEALTHCHECK --start-period=20m --start-interval=5s --interval=15s --timeout=10s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(os.environ['HEALTH_URL'], timeout=9)"]

ENTRYPOINT ["python3", "-m", "asl_server"]
CMD ["--help"]
