# docker build -t aimmerging . && docker run --rm -v "$PWD/demo:/work/demo" aimmerging demo --out demo
# For a GPU: build with --build-arg TORCH= (the CUDA build of torch) and run with --gpus all.
FROM python:3.11-slim

ARG TORCH="--index-url https://download.pytorch.org/whl/cpu"
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir $TORCH torch==2.13.0 \
    && pip install --no-cache-dir -c constraints.txt ".[trl]"

WORKDIR /work
ENTRYPOINT ["aimmerging"]
CMD ["--help"]
