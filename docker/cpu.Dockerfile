# recalkv_vllm with vLLM's CPU build: docker build -f docker/cpu.Dockerfile -t recalkv-cpu .
FROM python:3.12-slim-bookworm

# The compiler builds the kernels, and at run time what torch.compile makes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/recalkv
# The stack first: it changes seldom, and is most of the image.
COPY Makefile ./
RUN PIP_NO_CACHE_DIR=1 make .venv/.stack-cpu
ENV PATH=/opt/recalkv/.venv/bin:$PATH

COPY . .
RUN pip install --no-cache-dir --no-build-isolation . \
    && useradd --create-home --uid 10001 recalkv
USER 10001
WORKDIR /home/recalkv

EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=5m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
