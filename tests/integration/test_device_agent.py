"""The SDK in a test's own process, against a real broker, hub and edge node."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deploy.local import Cluster, cluster
from device_agent import Agent, Answer, BlockingAgent
from models.errors import InvalidRequest, NotFound, NotReady
from models.zoo import digits

IMAGES, LABELS = digits.held_out()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("device")) as found:
        found.start_broker()
        found.start_hub()
        for tier in ("device", "edge"):
            found.publish(digits.package_folder(tier, "1"))
            found.deploy(f"digits-{tier}", tier, digits.MODEL, digits.PACKAGES[tier], "1")
        found.urls["cloud-1"] = "http://127.0.0.1:9"  # nothing listens on the discard port
        found.start_edge()
        found.wait_for_model("edge-1", digits.MODEL)
        yield found


@pytest.fixture(scope="module")
def config(running: Cluster) -> Path:
    return running.configure_device("device-1")


async def ask(agent: Agent, index: int, **options: float) -> Answer:
    return await agent.infer(digits.MODEL, {"image": IMAGES[index : index + 1]}, **options)  # type: ignore[arg-type]


async def test_a_sure_answer_is_made_in_this_process_and_an_unsure_one_at_the_edge(config: Path) -> None:
    async with Agent(config) as agent:
        await agent.wait_for(digits.MODEL)
        sure = await ask(agent, 0, min_confidence=0.0)
        assert (sure.tier, sure.package, sure.version, sure.reason) == ("device", "digits-int8", "1", "confident")
        assert sure.confidence is not None
        assert 0 < sure.latency_ms < 1000
        unsure = await ask(agent, 0, min_confidence=1.0, deadline_ms=2000)
        assert (unsure.tier, unsure.package) == ("edge", "digits-cnn")
        assert agent.running() == {digits.MODEL: "digits-int8/1"}


async def test_lists_are_taken_as_the_model_wants_them(config: Path) -> None:
    async with Agent(config) as agent:
        await agent.wait_for(digits.MODEL)
        plain = await agent.infer(digits.MODEL, {"image": IMAGES[:2].astype(int).tolist()}, min_confidence=0.0)
        assert plain.outputs["probabilities"].shape == (2, 10)
        assert plain.outputs["probabilities"].argmax(axis=1).tolist() == LABELS[:2].tolist()


@pytest.mark.parametrize(
    ("model", "inputs", "options", "error", "words"),
    [
        ("digits", {"image": np.zeros((1, 64))}, {}, InvalidRequest, "input 'image': expected datatype FP32, got FP64"),
        ("digits", {"image": np.zeros((64,), np.float32)}, {}, InvalidRequest, "input 'image'"),
        ("digits", {"image": [[1.0], [2.0, 3.0]]}, {}, InvalidRequest, "input 'image'"),
        ("digits", {"image": [["ink"] * 64]}, {}, InvalidRequest, "input 'image'"),
        ("digits", {"image": [[None] * 64]}, {}, InvalidRequest, "input 'image'"),
        ("digits", {"image": [[10**30] * 64]}, {}, InvalidRequest, "input 'image'"),
        ("faces", {"image": [[None] * 64]}, {}, InvalidRequest, "input 'image'"),
        ("digits", {"picture": [[0.0] * 64]}, {}, InvalidRequest, "picture"),
        ("digits", {}, {}, InvalidRequest, "image"),
        ("digits", {"image": [[0.0] * 64]}, {"deadline_ms": -1}, InvalidRequest, "deadline_ms"),
        ("digits", {"image": [[0.0] * 64]}, {"deadline_ms": float("nan")}, InvalidRequest, "deadline_ms"),
        ("digits", {"image": [[0.0] * 64]}, {"deadline_ms": float("inf")}, InvalidRequest, "deadline_ms"),
        ("digits", {"image": [[0.0] * 64]}, {"min_confidence": 2.0}, InvalidRequest, "min_confidence"),
        ("digits", {"image": [[0.0] * 64]}, {"outputs": ("logits",)}, InvalidRequest, "logits"),
    ],
)
async def test_bad_input_is_refused_naming_the_field(
    config: Path, model: str, inputs: dict[str, object], options: dict[str, object], error: type[Exception], words: str
) -> None:
    async with Agent(config) as agent:
        await agent.wait_for(digits.MODEL)
        with pytest.raises(error, match=words):
            await agent.infer(model, inputs, **options)  # type: ignore[arg-type]


async def test_a_model_that_is_nowhere_and_a_tier_that_is_away_are_told_apart(config: Path, running: Cluster) -> None:
    async with Agent(config) as agent:
        with pytest.raises(NotReady, match=r"refused|suspended"):
            await agent.infer("faces", {"image": [[0.0] * 64]}, deadline_ms=2000)
    alone = config.with_name("alone.toml")
    write(alone, config.read_text().replace(f'edge = "{running.urls["edge-1"]}"\n', ""))
    async with Agent(alone) as agent:
        with pytest.raises(NotFound, match="faces"):
            await agent.infer("faces", {"image": [[0.0] * 64]})


def write(path: Path, text: str) -> None:
    path.write_text(text)


def test_the_blocking_twin_answers_from_several_threads_and_leaves_none_behind(config: Path) -> None:
    before = threading.active_count()
    with BlockingAgent(config) as agent:
        agent.wait_for(digits.MODEL)
        answers: list[int] = []

        def ask_all() -> None:
            for index in range(20):
                answer = agent.infer(digits.MODEL, {"image": IMAGES[index : index + 1]}, deadline_ms=2000)
                answers.append(int(answer.outputs["probabilities"].argmax()))

        threads = [threading.Thread(target=ask_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(answers) == 80
    assert threading.active_count() <= before
    with pytest.raises(NotReady, match="with BlockingAgent"):
        agent.infer(digits.MODEL, {"image": IMAGES[:1]})


def test_leaving_the_block_lets_no_caller_wait(config: Path) -> None:
    outcomes: list[BaseException] = []
    with BlockingAgent(config) as agent:

        def wait() -> None:
            try:
                agent.wait_for("a model that never comes", timeout=60)
            except NotReady as error:
                outcomes.append(error)

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        agent.wait_for(digits.MODEL)
    for thread in threads:
        thread.join(10)
    assert len(outcomes) == 3


def test_the_process_on_standard_input_answers_every_line(config: Path) -> None:
    good = json.dumps(
        {"model": "digits", "inputs": {"image": [[0.0] * 64]}, "deadline_ms": 2000, "id": "good"}
    ).encode()
    bad = [
        b"{",
        b"\xff",
        b"[" * 5000,
        b'{"model":"digits","inputs":{},"surprise":1}',
        b'{"model":"faces","inputs":{"x":[null]}}',
        b'{"model":"digits","inputs":{"image":[[1' + b"0" * 400 + b"]]}}",
        b'{"model":"digits","inputs":{"image":[["a"]]}}',
    ]
    run = subprocess.run(
        [sys.executable, "-m", "tierline", "device", str(config)],
        input=b"\n".join([*bad, good]) + b"\n",
        capture_output=True,
        timeout=60,
        check=True,
    )
    *refused, answer = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(refused) == len(bad)
    assert all(isinstance(line["error"], str) and line["error"] != "internal error" for line in refused)
    assert answer["id"] == "good"
    assert np.shape(answer["outputs"]["probabilities"]) == (1, 10)


def test_standard_input_may_be_a_file_or_nothing(config: Path, tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"model":"digits","inputs":{"image":[[' + ",".join(["0.5"] * 64) + ']]},"deadline_ms":2000}\n')
    for source, answers in ((requests, 1), (Path(os.devnull), 0)):
        with source.open("rb") as file:
            run = subprocess.run(
                [sys.executable, "-m", "tierline", "device", str(config)],
                stdin=file,
                capture_output=True,
                timeout=60,
                check=True,
            )
        assert [json.loads(line)["tier"] for line in run.stdout.splitlines()] in ([], ["device"], ["edge"])
        assert len(run.stdout.splitlines()) == answers
        assert b"Traceback" not in run.stderr


async def test_outside_its_block_an_agent_says_so(config: Path) -> None:
    with pytest.raises(NotReady, match="async with Agent"):
        await Agent(config).infer(digits.MODEL, {"image": IMAGES[:1]})


async def test_without_any_network_it_answers_from_its_own_disk(running: Cluster, config: Path) -> None:
    async with Agent(config) as agent:
        await agent.wait_for(digits.MODEL)
    text = config.read_text()
    for url in (running.broker.url, running.urls["edge-1"]):
        text = text.replace(url, url.rpartition(":")[0] + ":9")
    cut_off = config.with_name("cut-off.toml")
    write(cut_off, text)
    async with Agent(cut_off) as agent:
        assert not agent.connected
        answer = await ask(agent, 0, min_confidence=1.0, deadline_ms=500)
        assert (answer.tier, answer.degraded, answer.reason) == ("device", True, "up_unreachable")


async def test_answers_keep_their_requests_when_many_are_under_way(config: Path) -> None:
    async with Agent(config) as agent:
        await agent.wait_for(digits.MODEL)
        alone = [await ask(agent, index, min_confidence=0.0) for index in range(40)]
        together = await asyncio.gather(*(ask(agent, index, min_confidence=0.0) for index in range(40)))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one.outputs["probabilities"], other.outputs["probabilities"])
