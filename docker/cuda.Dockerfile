# recalkv_vllm with vLLM's CUDA build: docker build -f docker/cuda.Dockerfile -t recalkv-cuda .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# The nvcc above has the CUDA major of this vLLM's torch.
RUN pip install --no-cache-dir vllm==0.33.0 'setuptools>=77,<81' ninja==1.13.0

WORKDIR /src
COPY . .
# No GPU is at hand while an image is built.
ENV TORCH_CUDA_ARCH_LIST="8.0 9.0"
RUN pip install --no-cache-dir --no-build-isolation .

FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Triton compiles launchers in C at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

RUN useradd --create-home --uid 10001 recalkv
USER 10001
WORKDIR /home/recalkv

EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
