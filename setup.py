"""Package metadata. The build system and the tools' settings are in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = runpy.run_path(str(HERE / "megatron_align" / "version.py"))["__version__"]
EVAL = ["math-verify[antlr4-13-2]>=0.9,<1"]  # check: math of evaluation tasks
FLASH = ["flash-attn>=2.8,<3"]  # model.attention: flash
TE = ["transformer-engine[pytorch]>=2.9,<3"]  # model.linear: te, model.attention: te, train.fp8
PAS = ["datasketch>=2,<3"]  # near duplicates of `pas build` and `data dedup`

setup(
    name="megatron-align",
    version=VERSION,
    description="Alignment training on megatron-core: packed SFT and preference optimisation, HF in, HF out",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # An SPDX expression; setuptools refuses a licence classifier next to it.
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10,<3.14",
    # `megatron_align/kernels` and `megatron_align/tools` are links to the top-level folders, so this
    # one pattern finds them too, and a wheel holds real files.
    packages=find_packages(include=["megatron_align", "megatron_align.*"]),
    package_data={"megatron_align.rehearsal": ["*.cpp"]},
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "megatron-core>=0.16.1,<0.20",  # from 0.17 on for Python 3.12 and newer only
        "transformers>=5,<6",
        "safetensors>=0.4.5",
        "sentencepiece>=0.2",
        "tiktoken>=0.7",
        "numpy<2.4",  # the Triton 3.6 interpreter breaks from 2.4 on
        "jsonargparse[signatures]>=4.40",
        "pyyaml>=6",
        "rich>=13",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
        "pyarrow>=15",
    ],
    extras_require={
        "test": [
            *EVAL,
            *PAS,
            "pytest>=8",
            "pytest-xdist>=3.7",
            "setuptools>=77",
            "wheel>=0.43",
            "hypothesis>=6",
            "trl>=1.14.2,<1.17",  # 1.14.2 is the newest for Python 3.10; tests/constraints/ has the exact ones
            "peft>=0.21,<0.22",
            "datasets>=3",
        ],
        "eval": [*EVAL, "lm_eval>=0.4.13,<0.5"],  # kind: lm_eval of evaluation tasks
        "pas": PAS,
        # Optional packages by their switches (docs/optional_packages.md), compiled against the torch that is installed.
        "flash": FLASH,
        "te": TE,
        "gpu": [*FLASH, *TE],
        # Not on the package index, where `apex` is another project: optimizer.implementation: apex, and
        # train.gradient_accumulation_fusion. Built with APEX_CPP_EXT=1 APEX_CUDA_EXT=1.
        "apex": ["apex @ git+https://github.com/NVIDIA/apex"],
        "dev": ["ruff>=0.9", "mypy>=2.3,<3", "pre-commit>=3"],
    },
    entry_points={"console_scripts": ["megatron-align = megatron_align.tools.main:main"]},
)
