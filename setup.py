import re
from pathlib import Path

from setuptools import find_packages, setup


here = Path(__file__).parent
source = (here / "elastic_hf" / "version.py").read_text(encoding="utf-8")
version = re.search(r'__version__ = "(.+)"', source).group(1)

faiss = ["faiss-cpu>=1.12"]
onnx = ["onnx>=1.20", "onnxruntime>=1.24", "onnxscript>=0.6"]
ray = ["ray[data,serve,train]>=2.60"]
serve = ["fastapi>=0.120", "prometheus-client>=0.21", "redis>=6", "uvicorn>=0.30"]
tensorboard = ["tensorboard>=2.16"]
demo = ["gradio>=6"]
optuna = ["optuna>=4"]
trackio = ["trackio>=0.21"]
text = ["sentence-transformers>=5.0"]
docs = ["mkdocstrings-python>=2.0", "zensical>=0.0.73"]
test = [*demo, *faiss, *onnx, *optuna, *ray, *serve, *tensorboard, *trackio, "ipykernel>=7"]
test += ["flask>=3", "flask-cors>=5", "moto[s3]>=5", "nbclient>=0.10", "parameterized>=0.9", "pillow>=11"]
test += ["playwright>=1.50", "pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", "setuptools>=77"]

setup(
    name="elastic_hf",
    version=version,
    description="Long-history sequential recommendation with ELASTIC for the Hugging Face ecosystem",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["elastic_hf", "elastic_hf.*"]),
    package_data={
        "elastic_hf": ["py.typed"],
        "elastic_hf.sharing": ["data_sources.yaml", "templates/*"],
    },
    entry_points={"console_scripts": ["elastic-hf = elastic_hf.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.10",
        "datasets>=5.0",
        "filelock>=3.13",
        "huggingface-hub>=2.0",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=2.0",
        "polars>=1.30",
        "pyarrow>=20",
        "pyyaml>=6",
        "safetensors>=0.6",
        "tokenizers>=0.22",
        "torch>=2.8",
        "tqdm>=4.66",
        "transformers>=5.20,<6",
    ],
    extras_require={
        "demo": demo,
        "faiss": faiss,
        "onnx": onnx,
        "optuna": optuna,
        "ray": ray,
        "serve": serve,
        "tensorboard": tensorboard,
        "text": text,
        "trackio": trackio,
        "test": test,
        "docs": docs,
        "dev": [*test, *docs, "pre-commit>=4", "ty>=0.0.100"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
