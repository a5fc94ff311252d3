"""Compiles Triton kernels for GPUs that are not there, and says what they need.

`compile_variants` starts one process without TRITON_INTERPRET (in an interpreted one
there is nothing to compile) and hands it the variants as JSON. That process compiles
each as Triton would at its first launch, and reads what ptxas says of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 90)
"""Compute capabilities times ten: A100 and H100."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel with the types and values that a launch would give its arguments."""

    kernel: str
    """``module:name`` of the function under `triton.jit`."""
    signature: Mapping[str, str]
    """Argument -> type in order (``*fp16``, ``i32``, ...); constexprs are left out."""
    constants: Mapping[str, int | float | bool | None] = dataclasses.field(
        default_factory=dict
    )
    """Constexprs, and arguments of 1 or None, which Triton compiles in."""
    divisible_by_16: Sequence[str] = ()
    """Arguments that Triton would find to be multiples of 16."""
    num_warps: int = 4
    num_stages: int = 3


@dataclasses.dataclass(frozen=True)
class Assembled:
    """What a kernel needs of an architecture, as ptxas reports it."""

    kernel: str
    arch: int
    registers: int
    """A thread."""
    spill_stores: int
    """Bytes a thread."""
    spill_loads: int
    """Bytes a thread."""
    shared: int
    """Bytes a program."""
    ptx: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return (
            f"{self.kernel.rpartition(':')[2]} sm_{self.arch}: {self.registers} "
            f"registers, {self.spill_stores} + {self.spill_loads} bytes spilled, "
            f"{self.shared} bytes of shared memory"
        )


def compile_variants(
    variants: Sequence[Variant], architectures: Sequence[int] = ARCHITECTURES
) -> list[Assembled]:
    """Each variant for each architecture, in a process of its own.

    Raises:
        RuntimeError: A variant does not compile; the message ends in what was said.
    """
    order = json.dumps(
        {
            "architectures": list(architectures),
            "variants": [dataclasses.asdict(variant) for variant in variants],
        }
    )
    with tempfile.TemporaryDirectory() as cache:
        paths = [str(ROOT / "kernels"), str(ROOT)]
        # Another Triton than the installed one, for one.
        if given := os.environ.get("PYTHONPATH"):
            paths.append(given)
        environment = {
            **os.environ,
            "TRITON_CACHE_DIR": cache,
            "TRITON_DUMP_PTXAS_LOG": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        }
        environment.pop("TRITON_INTERPRET", None)
        done = subprocess.run(
            [sys.executable, "-m", "tests.triton.ahead_of_time"],
            cwd=ROOT,
            env=environment,
            input=order,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return [Assembled(**entry) for entry in json.loads(done.stdout)]


def _assemble(variant: Variant, arch: int) -> Assembled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = variant.kernel.split(":")
    function = getattr(importlib.import_module(module), name)
    # The compiler wants every argument in the signature, in the function's order.
    unknown = (variant.signature.keys() | variant.constants) - set(function.arg_names)
    if unknown:
        raise ValueError(f"{variant.kernel} has no arguments {sorted(unknown)}")
    signature = {
        argument: "constexpr"
        if argument in variant.constants
        else variant.signature[argument]
        for argument in function.arg_names
    }
    divisible = {
        (function.arg_names.index(argument),): [["tt.divisibility", 16]]
        for argument in variant.divisible_by_16
        if argument not in variant.constants
    }
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = triton.compile(
            ASTSource(function, signature, dict(variant.constants), divisible),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
        )
    log = said.getvalue()

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise ValueError(f"ptxas did not say {pattern!r}: {log}")
        return int(found[1])

    return Assembled(
        variant.kernel,
        arch,
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        shared=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
    )


def _main() -> None:
    order = json.load(sys.stdin)
    variants = [Variant(**entry) for entry in order["variants"]]
    assembled = [
        _assemble(variant, arch)
        for variant in variants
        for arch in order["architectures"]
    ]
    json.dump([dataclasses.asdict(entry) for entry in assembled], sys.stdout)


if __name__ == "__main__":
    _main()
