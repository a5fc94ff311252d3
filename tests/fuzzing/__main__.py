"""``make fuzz``: the long form.

Sends the cases to a server with a policy. Those that it answers with a 5xx, or not at
all, are then sent to a stock server without our fields: what vLLM alone answers in the
same way is vLLM's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

from asl_vllm_testing.server import serve
from asl_vllm_testing.settings import SERVER_OPTIONS
from tests.fuzzing.bodies import OURS, Case, mutated, placed, raw
from tests.fuzzing.runner import IDLE, generated, run, state


def without_ours(case: Case) -> Case:
    """The same request as vLLM alone would get it."""
    try:
        body = json.loads(case.content)
    except (ValueError, RecursionError):
        return case
    if not isinstance(body, dict):
        return case
    rest = {key: value for key, value in body.items() if key not in OURS}
    return Case(case.path, json.dumps(rest).encode(), case.content_type, case.method)


def main() -> int:
    """Prints what was sent and answered; 1 where a failure is ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutated", type=int, default=4000)
    parser.add_argument("--generated", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    with serve(folder / "pruning.txt", *SERVER_OPTIONS) as server:
        openapi = server.http.get("/openapi.json").json()
        failures = []
        for name, cases in (
            ("no JSON or oversized", raw()),
            ("misplaced fields, ways to end", placed()),
            ("hostile fields", mutated(openapi, options.seed, options.mutated)),
            ("schemathesis", generated(openapi, options.seed, options.generated)),
        ):
            verdict = run(server.url, cases)
            failures += verdict.failures
            print(f"{name}: {verdict.shown()}", flush=True)
        after = state(server.http)
        print(f"afterwards: {after}", flush=True)
    if not failures:
        return int(after != IDLE)
    with serve(folder / "stock.txt") as stock:
        again = run(stock.url, (without_ours(case) for case, _ in failures))
    theirs = {case.content for case, _ in again.failures}
    ours = [
        (case, answer)
        for case, answer in failures
        if without_ours(case).content not in theirs
    ]
    print(
        f"{len(failures)} failures, of which vLLM alone has {len(failures) - len(ours)}"
    )
    for title, listed in (("ours", ours), ("vLLM's", again.failures)):
        kinds = itertools.groupby(sorted(listed, key=kind), key=kind)
        for about, group in kinds:
            some = list(group)
            print(f"\n{title}, {len(some)} times: {about}\n  {some[0][0].shown()}")
    return int(bool(ours) or after != IDLE)


def kind(failure: tuple[Case, str]) -> str:
    """Failures of one kind are shown once."""
    case, answer = failure
    return f"{case.path} {answer[:160]}"


if __name__ == "__main__":
    sys.exit(main())
