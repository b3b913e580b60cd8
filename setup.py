"""Packaging that setup.cfg cannot say: two top-level folders are installed inside the package.

`accelerate_configs/` and `recipes/` stay at the top of a checkout, where the documented commands name them, and are
found as `hf_fsdp_qlora/accelerate_configs` and `hf_fsdp_qlora/recipes` in a wheel. Everything else is in setup.cfg.
"""

from setuptools import find_packages, setup

SHIPPED_FOLDERS = {"hf_fsdp_qlora.accelerate_configs": "accelerate_configs", "hf_fsdp_qlora.recipes": "recipes"}

setup(
    packages=[*find_packages(include=["hf_fsdp_qlora", "hf_fsdp_qlora.*"]), *SHIPPED_FOLDERS],
    package_dir=SHIPPED_FOLDERS,
    package_data={name: ["*.yaml", "*/*.yaml", "*/*.py", "*/*.ipynb", "*/*.slurm"] for name in SHIPPED_FOLDERS},
)
