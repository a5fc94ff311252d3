"""Real clients against a running server, each in an environment of its own.

    python scripts/try_clients.py http://localhost:8000

The server is started as examples/README.md does, with ``--served-model-name small``
beside. Installs the newest release of each client from PyPI or npm into ``--folder``.
Each asks single requests, batches and streams, with and without a budget, and fails if
an answer is wrong, a warning is given or anything is raised.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROGRAMS = Path(__file__).parent / "clients"
CLIENTS = {
    "use_langchain.py": "langchain-openai",
    "use_litellm.py": "litellm",
    "use_openai.py": "openai",
    "use_anthropic.py": "anthropic",
    "use_openai.mjs": "openai",
}
"""Program in scripts/clients -> what it needs, of npm for ``.mjs``, else of PyPI."""
FILLER = "the sky is blue . "
PROMPTS = (
    "the sky is",
    f"the red key is 7 3 9 1 . {FILLER * 79}question : the red key is",
)


def install(program: str, package: str, folder: Path) -> list[str]:
    """Makes the environment, if need be; the command that runs the program in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if program.endswith(".mjs"):
        subprocess.run(["npm", "install", "--silent", package], cwd=folder, check=True)
        return ["node", str(PROGRAMS / program)]
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", package]
    subprocess.run(pip, check=True)
    return [str(python), str(PROGRAMS / program)]


def main() -> int:
    """Status 1 if a client failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="such as http://localhost:8000")
    parser.add_argument("clients", nargs="*", help="such as use_litellm.py; all")
    parser.add_argument("--folder", type=Path, default=None, help="kept for next time")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="clients-"))
    failed = []
    for program in args.clients or CLIENTS:
        own = (folder / program).resolve()
        command = install(program, CLIENTS[program], own)
        # Nothing of ours: these are other people's machines.
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        ran = subprocess.run([*command, args.url, *PROMPTS], cwd=own, env=environ)
        print(f"{program}: {'failed' if ran.returncode else 'right'}")
        if ran.returncode:
            failed.append(program)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
