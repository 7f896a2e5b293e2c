"""Hold the contracts with transformers, peft, accelerate and trl on the newest releases that pip finds.

    .venv/bin/python .ci/newest.py

Where constraints.txt has the newest releases there is nothing to do. Otherwise they are put in front of the libraries
of this environment, which stays as it is, and the tests of what we override run with them.
"""

import json
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

LIBRARIES = ("transformers", "peft", "accelerate", "trl")
TESTS = ("tests/training/test_hf_hooks.py", "tests/training/test_trainer.py", "tests/training/test_sft.py")
FOLDER = Path(".venv-newest")
PIP = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")


def newer() -> list[str]:
    """Releases that pip would install in place of those that are here."""
    asked = subprocess.run(
        [*PIP, "--dry-run", "--report", "-", "--upgrade", *LIBRARIES], check=True, capture_output=True, text=True
    )
    found = [package["metadata"] for package in json.loads(asked.stdout)["install"]]
    return [f"{package['name']}=={package['version']}" for package in found]


def main() -> int:
    """Exit code of the tests."""
    releases = newer()
    if not releases:
        print("newest: constraints.txt has the newest releases of", ", ".join(LIBRARIES))
        return 0
    print("newest:", ", ".join(releases), flush=True)
    venv.create(FOLDER, clear=True, symlinks=True)
    [packages] = FOLDER.glob("lib/python*/site-packages")
    (packages / "behind.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    subprocess.run([*PIP, "--target", str(packages), *releases], check=True)
    source = os.pathsep.join([str(Path("src").resolve()), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [str(FOLDER / "bin" / "python"), "-m", "pytest", "-q", "-m", "not slow", *TESTS]
    return subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": source}).returncode


if __name__ == "__main__":
    sys.exit(main())
