"""Print which Python and which packages an environment has:  versions.py ENVIRONMENT"""

import platform
import sys
from importlib.metadata import version

PACKAGES = {
    "torch": "torch",
    "Megatron-Core": "megatron-core",
    "transformers": "transformers",
    "TRL": "trl",
}

if __name__ == "__main__":
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version(package)}" for name, package in PACKAGES.items()]
    print(f"{sys.argv[1]}: {', '.join(versions)}")
