"""Prints the versions of this environment in a line: what scripts/test.sh begins with."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "trl", "lm-eval", "deepspeed")
PACKAGES += ("huggingface_hub", "numpy", "pydantic")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


if __name__ == "__main__":
    print("versions:", ", ".join(f"{name} {number}" for name, number in versions().items()), flush=True)
