"""What is recorded of a prompt is what a policy would have scored."""

from __future__ import annotations

from pathlib import Path

import torch

from asl_kernels.window_scores import window_scores
from benchmarks.accuracy.prompts import Prompt
from benchmarks.accuracy.recording import WINDOWS, Recorder, Recording, main
from tests.accuracy.conftest import MODEL


def test_scores_are_those_of_each_window(
    recorder: Recorder, prompt: Prompt, recording: Recording
) -> None:
    recorder.layers.begin_prompt(prompt.token_ids)
    for index, out in enumerate(recorder.layers.unpruned_layers()):
        for number, window in enumerate(WINDOWS):
            scale = out.q.shape[-1] ** -0.5
            want = window_scores(out.q[-window:], out.k, scale=scale, pool_kernel=1)
            got = recording.seen[number, index, :, : want.shape[1]]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    assert index == recording.seen.shape[1] - 1


def test_the_answer_is_found_and_read_in_the_prompt(
    recorder: Recorder, prompt: Prompt, recording: Recording
) -> None:
    assert len(recording.spans) == 1
    begin, end = recording.spans[0].tolist()
    found = recorder.tokenizer.decode(prompt.token_ids[begin:end])
    assert found.split() == prompt.answers[0].split()
    # The model has learnt to look there, and is right.
    assert recording.asked[:, :, begin:end].sum(-1).max() > 0.5
    assert recording.right.all()
    # The answer's tokens attend to one another, too.
    assert (recording.asked.sum(-1) < 1).all()


def test_prompts_are_recorded_once(tmp_path: Path) -> None:
    options = ["--tasks", "needle", "--lengths", "100", "--template", "none"]
    arguments = [MODEL, *options, "--n", "1", "--output", str(tmp_path)]
    main(arguments)
    (path,) = tmp_path.iterdir()
    assert Recording.load(path).seen.shape[:2] == (len(WINDOWS), 10)
    written = path.stat().st_mtime_ns
    main(arguments)
    assert path.stat().st_mtime_ns == written
