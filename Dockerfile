# docker build --build-arg TORCH_INDEX=... -t llama-bidir .     # see docs/container.md
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
# TORCH_INDEX is the package index of a torch build, such as that for CPUs. Without it, pip's own index decides.
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=
ARG EXTRAS=train,eval,serve
WORKDIR /build
RUN python3 -m venv /opt/llama-bidir
ENV PATH=/opt/llama-bidir/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN pip install ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} "${TORCH}"
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY llama_bidir llama_bidir
# The wheel is installed, not the checkout. Bytecode, headers and the tests of libraries are not needed to run.
RUN pip wheel --no-deps --wheel-dir dist . \
    && pip install "$(ls dist/*.whl)[${EXTRAS}]" \
    && pip uninstall --yes pip setuptools \
    && find /opt/llama-bidir -name __pycache__ -prune -exec rm -r {} + \
    && cd /opt/llama-bidir/lib/python3*/site-packages \
    && rm -rf torch/include pyarrow/include \
    && find scipy pandas sympy numpy matplotlib pyarrow networkx -type d -name tests -prune -exec rm -r {} +

FROM ${BASE} AS runtime
RUN useradd --create-home --uid 1000 reranker && mkdir /data && chown reranker /data
COPY --from=build /opt/llama-bidir /opt/llama-bidir
ENV PATH=/opt/llama-bidir/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/data/.cache
USER reranker
WORKDIR /data
EXPOSE 8000
# Exec form: the command is process 1 and receives SIGTERM itself.
ENTRYPOINT ["llama-bidir"]
CMD ["--help"]

FROM runtime AS server
HEALTHCHECK --start-period=5m --interval=10s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["serve", "--host", "0.0.0.0", "--model", "/model"]

FROM runtime
