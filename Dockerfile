# GPU image: everything from pip, nothing built from source. Not built by us yet.
#   docker build -t megatron_align .
#   docker run --gpus all --ipc=host megatron_align torchrun --nproc-per-node 8 -m megatron_align.train --config ...
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

# Triton compiles its launchers with gcc and needs Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/megatron_align
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
COPY . .
RUN pip install --no-cache-dir torch==2.13.0 "numpy<2.4" \
    && pip install --no-cache-dir -e . -c tests/constraints.txt
CMD ["python", "-m", "megatron_align.train", "--help"]
