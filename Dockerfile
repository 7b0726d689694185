# GPU image: everything from pip at pinned versions, nothing built from source unless requested. The check stage runs the
# tests on CPU: an image whose tests fail is not built.
#   docker build -t megatron_align .
#   docker build -t megatron_align --build-arg TESTS=tests/ops --build-arg FLASH_ATTN=2.8.3 .
#   docker build -t megatron_align --build-arg EXTRAS=gpu,apex .
#   docker run --rm --gpus all --ipc=host -v /models:/models -v "$PWD:/work" megatron_align \
#       torchrun --nproc-per-node 8 -m megatron_align.train --config run.yaml
# Any base with apt and Python 3.12 will do. docs/compatibility.md says how we build it, and when it was built last.
ARG BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04

FROM ${BASE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Triton compiles its launchers with gcc and needs Python's headers. Ubuntu keeps only the newest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -c 'import sys; v = sys.version_info[:2]; v == (3, 12) or sys.exit(f"error: the base needs Python 3.12, it has {v}")' \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/opt/constraints.txt
COPY docker/constraints.txt /opt/constraints.txt
# The largest layer, and the one that changes least: it does not depend on our sources.
RUN pip install torch==2.13.0 triton setuptools wheel

# Large optional packages, by version (Apex: by git revision); empty: not installed. They are compiled against this torch.
FROM base AS extras
ARG TRANSFORMER_ENGINE=""
ARG FLASH_ATTN=""
ARG APEX=""
ARG MAX_JOBS=8
RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
        pip install --no-build-isolation "transformer-engine[pytorch]==$TRANSFORMER_ENGINE"; \
    fi \
    && if [ -n "$FLASH_ATTN" ]; then \
        MAX_JOBS=$MAX_JOBS pip install --no-build-isolation "flash-attn==$FLASH_ATTN"; \
    fi \
    && if [ -n "$APEX" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS=$MAX_JOBS \
        pip install --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@$APEX"; \
    fi

FROM extras AS install
WORKDIR /opt/megatron_align
COPY . .
# Extras of setup.py, as `te,flash` (gpu: both) or `apex`: what they need in the newest versions that we support.
ARG EXTRAS=""
ARG MAX_JOBS=8
RUN if [ -n "$EXTRAS" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 MAX_JOBS=$MAX_JOBS \
        pip install --no-build-isolation -e ".[$EXTRAS]"; \
    else \
        pip install -e .; \
    fi

FROM install AS check
ARG TESTS="tests"
RUN pip install -e ".[test]" \
    && CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 python -m pytest -m "not slow" ${TESTS} \
    && date --utc +"%FT%TZ ${TESTS}" > /opt/tests_passed

FROM install AS image
# Depends on the check stage: only an image whose tests passed is built.
COPY --from=check /opt/tests_passed /opt/tests_passed
RUN useradd --create-home --uid 10001 align \
    && mkdir /work \
    && chown align:align /work
USER align
WORKDIR /work
CMD ["python", "-m", "megatron_align.train", "--help"]
