# docker build -t aimmerging . && docker run --rm -v "$PWD:/runs" aimmerging demo --out demo
# torch is the build that pip finds; --build-arg PIP_OPTIONS="..." names another index, for instance of builds for a CPU
# alone (pytorch.org/get-started). With a GPU, run with --gpus all.
FROM python:3.11-slim

ARG PIP_OPTIONS=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
RUN pip install --no-cache-dir $PIP_OPTIONS -c constraints.txt ".[trl]"

WORKDIR /runs
ENTRYPOINT ["aimmerging"]
CMD ["--help"]
