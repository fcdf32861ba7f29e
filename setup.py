"""Package metadata. The lower bounds are versions on which the tests passed; constraints.txt pins all tested versions."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="saro",
    version="0.1.0",
    description="Safety-oriented Reasoning Optimization: warm-up SFT and preference optimization of reasoning chains",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["saro", "saro.*"]), "saro_kernels"],
    # The folder kernels/ must not become a package itself: PyPI has a package named `kernels`.
    package_dir={"saro_kernels": "kernels/saro_kernels"},
    package_data={
        "saro.demo": ["*.jsonl"],
        "saro.evaluate": ["attack_files/*.yaml", "judges/*"],
        "saro.report": ["templates/*"],
        "saro.synth": ["policies/*.yaml", "prompt_templates/*.yaml"],
    },
    install_requires=[
        "accelerate>=1.15.0",
        "bitsandbytes>=0.50.2",
        "filelock>=4.2.12",
        "httpx2>=2.16.2",
        "jsonargparse[signatures]>=4.53.0",
        "jinja2>=3.1.6",
        "numpy>=2.3.5",
        "peft>=0.21.2",
        "psutil>=7.2.2",
        "pyyaml>=6.0.3",
        "rich>=15.0.0",
        "safetensors>=0.8.0",
        "tokenizers>=0.23.3",
        "torch>=2.11.0",
        "tqdm>=4.70.1",
        "transformers>=5.23.0",
    ],
    extras_require={
        "demo": ["gguf>=0.19.0", "matplotlib>=3.11.2"],
        "test": [
            # A real server on this machine for the tests: `transformers serve`.
            "fastapi>=0.165.0",
            # Parquet files and data sets of the hub.
            "datasets>=5.2.0",
            "pyarrow>=26.0.1",
            "gguf>=0.19.0",
            # The tests insert and remove its layers on a CPU, but these run only on CUDA.
            "liger-kernel>=0.8.5",
            "hypothesis>=6.170.15",
            "matplotlib>=3.11.2",
            "openai>=3.57.0",
            "pytest>=9.2.0",
            "pytest-randomly>=5.1.0",
            "pytest-timeout>=2.4.0",
            "pytest-xdist>=3.8.0",
            "ruff>=0.17.6",
            "tensorboard>=2.21.0",
            # The CUDA build of torch installs it, the CPU build does not. The tests interpret and compile the kernels.
            "triton>=3.6.0; platform_system == 'Linux'",
            "uvicorn>=0.54.0",
        ],
        "data": ["datasets>=5.2.0", "pyarrow>=26.0.1"],
        "bench": ["lm_eval>=0.4.13", "matplotlib>=3.11.2", "trl==1.16.0"],
        "lm-eval": ["lm_eval>=0.4.13"],
        "report": ["matplotlib>=3.11.2"],
        "liger": ["liger-kernel>=0.8.5"],
        "tensorboard": ["tensorboard>=2.21.0"],
        "wandb": ["wandb"],
    },
    entry_points={"console_scripts": ["saro=saro.cli:main"]},
)
