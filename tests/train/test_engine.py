"""fit() and evaluate(): gradients of a step, clipping, stopping and resuming, evaluation, and errors."""

from __future__ import annotations

import json
import math
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny import Training
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import saro.model.fused_lora
from saro.config import TrainConfig
from saro.data.dataset import ExampleSet
from saro.data.packs import Pack, pack_trees
from saro.data.steps import Step, Steps
from saro.distributed.runtime import Runtime
from saro.errors import SaroError
from saro.model.policy import Policy
from saro.train import engine
from saro.train.checkpoint import find_intact_checkpoint, list_checkpoints
from saro.train.engine import evaluate
from saro.train.optim import make_optimizer
from saro.train.rw_objective import RWObjective
from saro_kernels import LoraLinear, TokenStatistics

METHODS = ("full", "lora", "qlora")


class Bigram(nn.Module):
    """The smallest policy, in float64: a token's log-probs depend only on the token before it."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(264, 6, generator=random, dtype=torch.float64))
        self.head = nn.Parameter(torch.randn(264, 6, generator=random, dtype=torch.float64))

    evaluating = Policy.evaluating

    def forward(self, pack: Pack, gradient_rows: int | None = None) -> torch.Tensor:
        # The other rows may have a gradient too: nothing is saved here, and the loss does not depend on them.
        self.gradient_rows = gradient_rows
        return self._distributions(pack).gather(1, pack.row_target[:, None])[:, 0]

    def statistics(self, pack: Pack) -> TokenStatistics:
        logps = self._distributions(pack)
        return TokenStatistics(self(pack), -(logps.exp() * logps).sum(1), logps.argmax(1) == pack.row_target)

    def _distributions(self, pack: Pack) -> torch.Tensor:
        hidden = self.embedding.index_select(0, pack.input_ids).index_select(0, pack.row_hidden)
        return (hidden @ self.head.T).log_softmax(-1)

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())


class Sending:
    """Steps that send this process the signal ``number`` when step ``at`` is read."""

    def __init__(self, steps: Steps, at: int, number: int, times: int = 1) -> None:
        self.schedule, self._steps, self._at, self._number, self._times = steps.schedule, steps, at, number, times

    def __getitem__(self, step: int) -> Step:
        if step == self._at:
            for _ in range(self._times):
                os.kill(os.getpid(), self._number)
        return self._steps[step]


@contextmanager
def gradients_seen() -> Iterator[list[torch.Tensor]]:
    """Record the gradient of each optimizer step as one vector."""
    seen: list[torch.Tensor] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([p.grad.detach().flatten().clone() for p in parameters]))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def lines_of(training: Training) -> list[dict[str, float]]:
    text = (Path(training.options.output) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Loss and gradients of a step.


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_on_its_own_data(training, runtime, method):
    run = training(model={"method": method}, records_per_step=24, pack_tokens=1024)
    outcome = run.fit(runtime, 5)
    losses = [line["loss"] for line in lines_of(run)]
    assert (outcome.step, outcome.stopped_by) == (5, None)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.5


def test_only_the_rows_that_the_objective_names_are_asked_for_a_gradient(training, runtime, monkeypatch):
    monkeypatch.setattr(RWObjective, "gradient_rows", lambda self, pack: pack.rows - 3)
    policy = Bigram()
    run = training(policy=policy, pack_tokens=1024)
    (pack,) = run.steps[0].packs
    run.fit(runtime, 1)
    assert policy.gradient_rows == pack.rows - 3


def test_a_pack_begins_when_the_casts_of_the_pack_before_are_freed(training, runtime, monkeypatch):
    """They are as large as the adapters, and the start-up check of memory runs one pack only."""
    run = training(model={"dtype": "bfloat16"}, pack_tokens=256, records_per_step=8)
    assert len(run.steps[0].packs) > 1
    casts, alive = [], []
    original = saro.model.fused_lora._parts

    def parts(layer: nn.Module) -> LoraLinear:
        made = original(layer)
        casts.append(weakref.ref(made.a_cast))
        return made

    monkeypatch.setattr(saro.model.fused_lora, "_parts", parts)
    run.policy.register_forward_pre_hook(lambda *_: alive.append(sum(cast() is not None for cast in casts)))
    run.fit(runtime, 1)
    assert casts
    assert alive == [0] * len(run.steps[0].packs)


def test_the_loss_is_the_average_over_all_scored_tokens_of_the_step(training, runtime):
    policy = Bigram()
    run = training(policy=policy, pack_tokens=128)
    assert len(run.steps[0].packs) > 1
    logps = []
    with torch.no_grad():
        for record in run.steps[0].records:
            s = run.data.sequence(record)
            ids = torch.tensor(s.tokens.astype("int64"))
            rows = (policy.embedding[ids[:-1]] @ policy.head.T).log_softmax(-1)
            logps.append(rows.gather(1, ids[1:, None])[s.scored_from - 1 :, 0])
    run.fit(runtime, 1)
    assert lines_of(run)[0]["loss"] == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-12)


# Weights of tokens, with which the loss is divided by their sum over the step.
ROW_WEIGHTS = {"think": 0.25, "answer": 2.0, "safety/think": 0.0}


@pytest.mark.parametrize("weights", [{}, ROW_WEIGHTS], ids=["equal weights", "row weights"])
def test_gradients_do_not_depend_on_the_pack_size(training, runtime, weights):
    seen = {}
    for tokens in (110, 256, 4096):
        run = training(f"{tokens}", policy=Bigram(), pack_tokens=tokens, max_grad_norm=0)
        run.objective = RWObjective(run.data.kinds, weights)
        with gradients_seen() as gradients:
            run.fit(runtime, 3)
        seen[len(run.steps[0].packs)] = gradients
    one_record_each, _, whole = (seen[n] for n in sorted(seen, reverse=True))
    assert max(seen) == 4
    assert min(seen) == 1
    for gradients in seen.values():
        for step, expected in zip(gradients, whole, strict=True):
            assert (step - expected).norm() <= 1e-12 * expected.norm()
    assert one_record_each[0].norm() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_model_do_not_depend_on_the_pack_size(training, runtime, method):
    seen = []
    for tokens in (110, 4096):
        run = training(f"{tokens}", pack_tokens=tokens, max_grad_norm=0, model={"method": method})
        with gradients_seen() as gradients:
            run.fit(runtime, 1)
        seen.append(gradients[0])
    assert (seen[0] - seen[1]).norm() <= 2e-6 * seen[1].norm()


def two_processes(
    records: str, folder: str, output: str, records_per_step: str, pack_tokens: str, weights: str
) -> None:
    """Run one rank of a run in two processes, and save the gradients of each step to ``output``."""
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    runtime = Runtime(accelerator, accelerator.process_index, accelerator.num_processes, 1)
    run = Training.on(
        folder,
        records,
        Path(output),
        policy=Bigram(),
        records_per_step=int(records_per_step),
        pack_tokens=int(pack_tokens),
        max_grad_norm=0,
        rank=runtime.rank,
        processes=runtime.processes,
    )
    run.objective = RWObjective(run.data.kinds, json.loads(weights))
    packs = [sum(pack.rows > 0 for pack in run.steps[step].packs) for step in range(3)]
    with gradients_seen() as gradients:
        run.fit(runtime, 3)
    torch.save(
        {"processes": runtime.processes, "packs": packs, "gradients": gradients}, f"{output}/rank{runtime.rank}.pt"
    )
    runtime.end()


@pytest.mark.parametrize(
    ("records_per_step", "packs", "weights"),
    [(4, (2, 2), {}), (1, (1, 0), {}), (3, (1, 2), {}), (3, (1, 2), ROW_WEIGHTS)],
)
def test_two_processes_take_the_same_steps_as_one(
    training, runtime, recipes, records_file, examples, tiny_model, tmp_path, records_per_step, packs, weights
):
    """This holds also if the ranks have different numbers of packs, or if one has no record at all."""
    out = tmp_path / "two"
    arguments = (
        *(records_file(examples, "two.jsonl"), tiny_model(), out),
        *(records_per_step, 110, json.dumps(weights)),
    )
    done = recipes.run_ranks(2, *arguments, call=f"{__file__}:two_processes")
    assert [p.code for p in done] == [0, 0], done[0].err + done[1].err
    ranks = [torch.load(out / f"rank{r}.pt") for r in range(2)]
    assert [r["processes"] for r in ranks] == [2, 2]
    assert tuple(r["packs"][0] for r in ranks) == packs

    run = training(policy=Bigram(), records_per_step=records_per_step, pack_tokens=4096, max_grad_norm=0)
    run.objective = RWObjective(run.data.kinds, weights)
    with gradients_seen() as expected:
        run.fit(runtime, 3)
    for step in range(3):
        for rank in ranks:
            assert (rank["gradients"][step] - expected[step]).norm() <= 1e-12 * expected[step].norm()
    both = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line, other in zip(lines_of(run), both, strict=True):
        for name in ("loss", "grad_norm", "lr", "epoch", *(n for n in line if n.startswith("loss/"))):
            assert other[name] == pytest.approx(line[name], rel=1e-12), name


@dataclass(frozen=True)
class InTurn:
    """Examples whose trees come in the order of the records, or in the reverse order."""

    data: ExampleSet
    turn: int

    def trees(self, records, budget):
        return self.data.trees(records[:: self.turn], budget)


def test_the_same_records_in_another_order_within_a_step_give_the_same_gradient(training, runtime):
    seen = []
    for name, turn in (("a", 1), ("b", -1)):
        run = training(name, policy=Bigram(), max_grad_norm=0)
        run.steps = replace(run.steps, data=InTurn(run.data, turn))
        with gradients_seen() as gradients:
            run.fit(runtime, 1)
        seen.append(gradients[0])
    assert (seen[0] - seen[1]).norm() <= 1e-12 * seen[0].norm()


def test_dropout_is_on_in_training_and_the_same_for_the_same_seed(training, runtime):
    def after_two_steps(name: str, dropout: float, seed: int) -> dict[str, torch.Tensor]:
        run = training(name, model={"lora_dropout": dropout})
        torch.manual_seed(seed)  # must have no effect, because each step sets its own seed
        run.fit(runtime, 2)
        return run.weights()

    assert_same(after_two_steps("a", 0.5, 1), after_two_steps("b", 0.5, 2))
    without = after_two_steps("c", 0.0, 1)
    assert any(not torch.equal(w, without[n]) for n, w in after_two_steps("d", 0.5, 1).items())


def test_each_step_and_each_rank_has_its_own_random_numbers(training, runtime):
    """With one seed for all, dropout would drop the same units in every step."""
    seeds: list[int] = []
    for rank in range(2):
        run = training(f"{rank}")
        run.policy.register_forward_pre_hook(lambda *_: seeds.append(torch.initial_seed()))
        run.fit(replace(runtime, rank=rank), 3)
    per_pack = [len(run.steps[i].packs) for i in range(3)]
    assert len(seeds) == 2 * sum(per_pack)
    assert len(set(seeds)) == 6


def test_dropout_is_on_even_if_the_model_comes_in_eval_mode(training, runtime):
    ends = []
    for name, mode in (("train", True), ("eval", False)):
        run = training(name, model={"lora_dropout": 0.5})
        run.policy.train(mode)
        run.fit(runtime, 2)
        ends.append(run.weights())
    assert_same(*ends)


# Clipping.


def test_the_reported_gradient_norm_is_that_before_clipping(training, runtime):
    run = training(max_grad_norm=0.1)
    with gradients_seen() as gradients:
        run.fit(runtime, 1)
    free = training("free", max_grad_norm=0)
    with gradients_seen() as unclipped:
        free.fit(runtime, 1)
    assert lines_of(run)[0]["grad_norm"] == pytest.approx(unclipped[0].norm().item(), rel=1e-5)
    assert lines_of(run)[0]["grad_norm"] > 0.2
    assert gradients[0].norm().item() == pytest.approx(0.1, rel=1e-4)


def test_max_grad_norm_zero_turns_clipping_off(training, runtime):
    run = training(max_grad_norm=0)
    with gradients_seen() as gradients:
        run.fit(runtime, 1)
    assert gradients[0].norm().item() == pytest.approx(lines_of(run)[0]["grad_norm"], rel=1e-5)
    assert gradients[0].norm() > 1


# Losses and gradients that are not finite.


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_step(training, runtime, poison):
    run = training(model={"method": "full"}, save_every=1)
    run.fit(runtime, 2)
    record = run.steps[2].records[0]
    token = int(run.data.sequence(record).tokens[5])
    with torch.no_grad():
        run.policy.causal_lm.get_input_embeddings().weight[token] = poison
    before = run.weights()
    files = sorted(p.name for p in (Path(run.options.output) / "checkpoints").rglob("*"))
    resumed = training(model={"method": "full"}, save_every=1)
    resumed.policy = run.policy
    checkpoint = list_checkpoints(Path(run.options.output) / "checkpoints")[-1][1]
    weights = checkpoint / "trainable.safetensors"
    from safetensors.torch import load_file, save_file

    poisoned = load_file(weights)
    poisoned["model.embed_tokens.weight"][token] = poison
    save_file(poisoned, weights)
    # As of a run from before the weights had a hash: with it, the checkpoint would be known as damaged.
    (checkpoint / "state.json").write_text('{"step": 2}')
    names = [run.data.ids[r] for r in run.steps[2].records]
    with pytest.raises(SaroError, match="step 3: loss nan") as error:
        resumed.fit(runtime, 4, resume=True)
    assert f"Records of the step: {', '.join(names)}." in str(error.value)
    assert "the weights were not changed" in str(error.value)
    after = resumed.weights()
    assert all(torch.equal(after[n].nan_to_num(1e9), before[n].nan_to_num(1e9)) for n in before)
    assert sorted(p.name for p in (Path(run.options.output) / "checkpoints").rglob("*")) == files
    assert [line["step"] for line in lines_of(run)] == [1, 2]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_gradient_norm_that_is_not_finite_stops_even_if_the_loss_is_finite(training, runtime, optimizer):
    run = training(optimizer=optimizer)
    before = run.weights()
    parameter = next(p for name, p in run.policy.trainable().items() if "lora_B" in name)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(SaroError, match=r"step 1: loss \d\.\d+, gradient norm (inf|nan)"):
        run.fit(runtime, 4, save_every=1)
    assert_same(run.weights(), before)
    assert list_checkpoints(Path(run.options.output) / "checkpoints") == []
    assert lines_of(run) == []


def test_signal_handlers_are_restored_after_an_error(training, runtime):
    run = training()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    next(iter(run.policy.trainable().values())).register_hook(lambda g: g * float("nan"))
    with pytest.raises(SaroError):
        run.fit(runtime, 1)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


# Stopping and resuming.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(training, runtime, number):
    run = training()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    run.steps = Sending(run.steps, at=1, number=number)
    outcome = run.fit(runtime, 4)
    assert (outcome.step, outcome.stopped_by) == (2, number)
    assert [step for step, _ in list_checkpoints(Path(run.options.output) / "checkpoints")] == [2]
    assert [line["step"] for line in lines_of(run)] == [1, 2]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_in_the_last_step_does_not_count_as_a_stop(training, runtime):
    run = training()
    run.steps = Sending(run.steps, at=3, number=signal.SIGTERM)
    outcome = run.fit(runtime, 4)
    assert (outcome.step, outcome.stopped_by) == (4, None)
    assert [step for step, _ in list_checkpoints(Path(run.options.output) / "checkpoints")] == [4]


def test_a_second_ctrl_c_interrupts_at_once(training, runtime, monkeypatch):
    run = training()

    class Impatient(Sending):
        def __getitem__(self, step: int) -> Step:
            os.kill(os.getpid(), signal.SIGINT)
            now = engine.time.monotonic()
            monkeypatch.setattr(engine.time, "monotonic", lambda: now + 60)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("not reached")

    run.steps = Impatient(run.steps, at=0, number=signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.fit(runtime, 4)
    assert list_checkpoints(Path(run.options.output) / "checkpoints") == []


def test_a_launcher_that_repeats_the_ctrl_c_does_not_cost_the_checkpoint(training, runtime):
    """torchrun sends its children its own SIGINT right after that of the terminal, which has already reached them."""
    run = training()
    run.steps = Sending(run.steps, at=1, number=signal.SIGINT, times=2)
    outcome = run.fit(runtime, 4)
    assert (outcome.step, outcome.stopped_by) == (2, signal.SIGINT)
    assert [step for step, _ in list_checkpoints(Path(run.options.output) / "checkpoints")] == [2]


RESUMED = [
    ("lora", {"lora_dropout": 0.3}, "adamw"),
    ("qlora", {"lora_dropout": 0.3}, "adamw"),
    ("full", {}, "adamw"),
    ("full", {}, "adamw8bit"),
    ("full", {}, "paged_adamw8bit"),
    ("lora", {"gradient_checkpointing": True, "lora_dropout": 0.3}, "adamw"),
]


@pytest.mark.parametrize(("method", "model", "optimizer"), RESUMED)
def test_two_steps_a_stop_and_two_more_equal_four_steps_bit_for_bit(training, runtime, method, model, optimizer):
    options = {"model": {"method": method} | model, "optimizer": optimizer, "weight_decay": 0.1, "warmup": 0.5}
    unbroken = training("unbroken", **options)
    unbroken.fit(runtime, 4)

    stopped = training("stopped", **options)
    stopped.steps = Sending(stopped.steps, at=1, number=signal.SIGTERM)
    assert stopped.fit(runtime, 4).step == 2

    torch.manual_seed(12345)
    resumed = training("stopped", **options)
    outcome = resumed.fit(runtime, 4, resume=True)
    assert (outcome.step, outcome.stopped_by) == (4, None)
    assert_same(resumed.weights(), unbroken.weights())
    assert any(not torch.equal(w, stopped.weights()[n]) for n, w in resumed.weights().items())
    for name in ("trainable.safetensors", "state.json"):
        a, b = (Path(r.options.output) / "checkpoints" / "step_000004" / name for r in (unbroken, resumed))
        assert a.read_bytes() == b.read_bytes(), name
    states = [
        torch.load(Path(r.options.output) / "checkpoints" / "step_000004" / "optimizer.pt", weights_only=True)
        for r in (unbroken, resumed)
    ]
    assert_states_equal(*states)
    timing = ("tokens_per_second", "peak_memory_gib")
    a, b = ([{k: v for k, v in line.items() if k not in timing} for line in lines_of(r)] for r in (unbroken, resumed))
    assert a == b


def assert_states_equal(a: object, b: object, at: str = "") -> None:
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            assert_states_equal(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_states_equal(x, y, f"{at}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, at
        assert torch.equal(a, b), at
    else:
        assert a == b, at


def test_resume_uses_the_newest_checkpoint(training, runtime):
    run = training(save_every=1, keep_checkpoints=3)
    run.steps = Sending(run.steps, at=10, number=signal.SIGTERM)
    run.fit(runtime, 12)
    asked: list[int] = []

    class Noting(Sending):
        def __getitem__(self, step: int) -> Step:
            asked.append(step)
            return super().__getitem__(step)

    resumed = training()
    resumed.steps = Noting(resumed.steps, at=-1, number=0)
    resumed.fit(runtime, 12, resume=True)
    assert asked == [11]


def test_a_damaged_newest_checkpoint_costs_its_steps_and_nothing_else(training, runtime, capsys):
    """The files that say what the run did then agree with the step that it continues from."""
    unbroken = training("unbroken")
    unbroken.fit(runtime, 4)
    run = training("run", save_every=1, keep_checkpoints=3)
    run.steps = Sending(run.steps, at=2, number=signal.SIGTERM)
    run.fit(runtime, 4)
    output = Path(run.options.output)
    (output / "checkpoints" / "step_000003" / "trainable.safetensors").write_bytes(b"")
    (output / "margins.jsonl").write_text('{"step": 2, "margin": 1}\n{"step": 3, "margin": 1}\n')
    (output / "after.json").write_text("{}")
    capsys.readouterr()

    resumed = training("run", save_every=1, keep_checkpoints=3)
    left: list[object] = []

    class Looking(Sending):
        def __getitem__(self, step: int) -> Step:
            left.append([line["step"] for line in lines_of(run)])
            left.append((output / "margins.jsonl").read_text())
            left.append((output / "after.json").exists())
            return super().__getitem__(step)

    resumed.steps = Looking(resumed.steps, at=-1, number=0)
    assert resumed.fit(runtime, 4, resume=True).step == 4
    assert left[:3] == [[1, 2], '{"step": 2, "margin": 1}\n', False]
    assert_same(resumed.weights(), unbroken.weights())
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4]
    assert [step for step, _ in list_checkpoints(output / "checkpoints")] == [2, 3, 4]
    assert find_intact_checkpoint(output / "checkpoints", pytest.fail).name == "step_000004"
    said = capsys.readouterr().err
    assert said.count("step_000003: the checkpoint is damaged (trainable.safetensors is not what was written)") == 1
    assert "resuming after step 2 of 4" in said


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_scratch(training, runtime):
    run = training()
    run.fit(runtime, 2)
    (Path(run.options.output) / "checkpoints" / "step_000002" / "state.json").unlink()
    with pytest.raises(SaroError, match="and there is no intact one"):
        training().fit(runtime, 4, resume=True)
    assert [line["step"] for line in lines_of(run)] == [1, 2]


def test_a_stop_writes_its_checkpoint_before_a_due_evaluation_which_the_resumed_run_makes(training, runtime):
    """A cluster sends SIGTERM and soon after SIGKILL, and an evaluation may take longer than that."""
    evaluated: list[tuple[str, int, list[int]]] = []

    def evaluating(run: Training, name: str) -> Callable[[int], dict[str, float]]:
        def held_out(step: int) -> dict[str, float]:
            checkpoints = list_checkpoints(Path(run.options.output) / "checkpoints")
            evaluated.append((name, step, [step for step, _ in checkpoints]))
            return evaluate(runtime, run.policy, run.objective, run.steps[7].packs)

        return held_out

    unbroken = training("unbroken", eval_every=2, save_every=2)
    unbroken.fit(runtime, 4, evaluate=evaluating(unbroken, "unbroken"))
    stopped = training("run", eval_every=2)
    stopped.steps = Sending(stopped.steps, at=1, number=signal.SIGTERM)
    assert stopped.fit(runtime, 4, evaluate=evaluating(stopped, "stopped")).step == 2
    for _ in range(2):  # the second time there is nothing left to do
        resumed = training("run", eval_every=2)
        resumed.fit(runtime, 4, evaluate=evaluating(resumed, "resumed"), resume=True)
    assert evaluated == [("unbroken", 2, [2]), ("resumed", 2, [2])]
    timing = ("tokens_per_second", "peak_memory_gib")
    a, b = ([{k: v for k, v in line.items() if k not in timing} for line in lines_of(r)] for r in (unbroken, stopped))
    assert a == b


def test_a_finished_run_is_extended_on_the_schedule_of_the_new_number_of_steps(training, runtime, capsys):
    options = {"schedule": "linear", "warmup": 0}
    training(**options).fit(runtime, 2)
    run = training(**options)
    assert run.fit(runtime, 4, resume=True).step == 4
    assert "resuming after step 2 of 4; learning rate 0.005, linear over 4 steps" in capsys.readouterr().err
    assert [line["lr"] for line in lines_of(run)] == pytest.approx([0.01, 0.005, 0.005, 0.0025])


def test_a_run_that_has_made_more_steps_than_it_is_now_asked_for_is_refused(training, runtime):
    run = training()
    run.fit(runtime, 3)
    with pytest.raises(SaroError, match=r"the run has made 3 steps, and .* now ask for 2; ask for 3 or more"):
        training().fit(runtime, 2, resume=True)
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3]


def test_resume_without_a_checkpoint_starts_at_the_first_step(training, runtime):
    run = training()
    (Path(run.options.output) / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n')
    assert run.fit(runtime, 2, resume=True).step == 2
    assert [line["step"] for line in lines_of(run)] == [1, 2]
    assert lines_of(run)[0]["loss"] < 99


def test_resuming_a_finished_run_only_loads_its_weights(training, runtime):
    run = training()
    run.fit(runtime, 2)
    again = training()
    with gradients_seen() as gradients:
        outcome = again.fit(runtime, 2, resume=True)
    assert (outcome.step, outcome.stopped_by, gradients) == (2, None, [])
    assert_same(again.weights(), run.weights())
    assert [line["step"] for line in lines_of(run)] == [1, 2]


def test_a_run_without_resume_ignores_checkpoints(training, runtime):
    training().fit(runtime, 2)
    run = training()
    with gradients_seen() as gradients:
        run.fit(runtime, 2)
    assert len(gradients) == 2


def test_checkpoints_are_written_every_save_every_steps_and_at_the_end(training, runtime):
    run = training(save_every=2, keep_checkpoints=10)
    run.fit(runtime, 5)
    assert [step for step, _ in list_checkpoints(Path(run.options.output) / "checkpoints")] == [2, 4, 5]


def test_without_save_every_there_is_one_checkpoint_at_the_end(training, runtime):
    run = training(save_every=0)
    run.fit(runtime, 3)
    assert [step for step, _ in list_checkpoints(Path(run.options.output) / "checkpoints")] == [3]


# Evaluation.


def test_evaluation_does_not_change_training(training, runtime):
    plain = training("plain", model={"lora_dropout": 0.3})
    plain.fit(runtime, 4)
    run = training("evaluated", model={"lora_dropout": 0.3}, eval_every=1)
    evaluated: list[int] = []

    def held_out(_: int) -> dict[str, float]:
        evaluated.append(len(evaluated))
        trees = [*run.steps[7].trees]
        return evaluate(runtime, run.policy, run.objective, pack_trees(trees, 256))

    run.fit(runtime, 4, evaluate=held_out)
    assert_same(run.weights(), plain.weights())
    assert len(evaluated) == 3


def test_evaluation_runs_every_eval_every_steps_but_not_after_the_last(training, runtime):
    """The recipe itself evaluates after the last step."""
    run = training(eval_every=2)
    run.fit(runtime, 6, evaluate=lambda step: {"eval/loss": 1.0})
    found = [line["step"] for line in lines_of(run) if "eval/loss" in line]
    assert found == [2, 4]
    assert [line["step"] for line in lines_of(run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_evaluation_has_no_dropout_and_keeps_the_mode(training, runtime):
    run = training(model={"lora_dropout": 0.5})
    run.fit(runtime, 2)
    run.policy.train()
    packs = run.steps[0].packs
    torch.manual_seed(1)
    first = evaluate(runtime, run.policy, run.objective, packs)
    torch.manual_seed(2)
    assert evaluate(runtime, run.policy, run.objective, packs) == first
    assert run.policy.training
    run.policy.eval()
    assert evaluate(runtime, run.policy, run.objective, packs) == first
    assert not run.policy.training


def test_evaluation_reports_each_kind_of_record_and_does_not_depend_on_packs(training, runtime):
    run = training(policy=Bigram())
    trees = run.data.trees(range(24), 256)
    wide = evaluate(runtime, run.policy, run.objective, pack_trees(trees, 4096))
    narrow = evaluate(runtime, run.policy, run.objective, pack_trees(trees, 110))
    parts = ("", "/general", "/safety", "/think", "/answer", "/stop")
    names = [f"eval/{name}" for name in ("loss", "entropy", "mean_token_accuracy")]
    assert wide.keys() == {name + part for name in names for part in parts}
    assert narrow == pytest.approx(wide, rel=1e-12)
    scored, kinds = run.data.scored_tokens, run.data.kinds
    for name in names:
        mean = sum(wide[f"{name}/{n}"] * scored[kinds == i].sum() for i, n in enumerate(("general", "safety")))
        assert wide[name] == pytest.approx(mean / scored.sum(), rel=1e-12)


def test_evaluation_computes_no_gradient(training, runtime):
    run = training()
    evaluate(runtime, run.policy, run.objective, run.steps[0].packs)
    assert all(p.grad is None for p in run.policy.trainable().values())


# Small updates are not lost.


def test_every_adapter_weight_changes_at_a_small_learning_rate(training, runtime):
    run = training(lr=1e-6, schedule="constant")
    run.fit(runtime, 4)
    shares = [line["changed_parameters"] for line in lines_of(run)]
    assert shares[0] < 1, "lora_A has no gradient while lora_B is zero"
    # A few momenta pass through zero; all others change their weight.
    assert min(shares[1:]) > 0.999


def test_bfloat16_adapters_would_lose_updates_and_the_metric_shows_it(training, runtime):
    """This is the control: from the same start, fp32 adapters change everywhere and bf16 adapters hardly at all."""
    share = {}
    for dtype in (torch.float32, torch.bfloat16):
        run = training(str(dtype), lr=1e-6, schedule="constant", pack_tokens=4096)
        run.fit(runtime, 1, lr=1e-2)  # lora_B is no longer zero
        for parameter in run.policy.trainable().values():
            parameter.data = parameter.data.to(dtype)
        run.fit(runtime, 3)
        share[dtype] = lines_of(run)[-1]["changed_parameters"]
    assert share[torch.float32] > 0.999
    assert share[torch.bfloat16] < 0.1


def test_a_parameter_that_does_not_change_shows_in_the_metric(training, runtime):
    run = training(lr=1e-3, schedule="constant", weight_decay=0.0)
    run.fit(runtime, 1)  # lora_B is no longer zero
    trainable = run.policy.trainable()
    stuck = next(p for name, p in trainable.items() if "lora_A" in name)
    stuck.register_hook(torch.zeros_like)
    run.fit(runtime, 1)
    probed = sum(min(p.numel(), 1024) for p in trainable.values())
    assert lines_of(run)[0]["changed_parameters"] == pytest.approx(1 - min(stuck.numel(), 1024) / probed, abs=1e-3)


def test_an_optimizer_that_holds_other_tensors_than_the_models_is_noticed_in_the_first_step(
    training, runtime, monkeypatch
):
    """As one that was made before the model was wrapped: it would train nothing, without an error."""

    def of_copies(parameters: list[nn.Parameter], options: TrainConfig) -> torch.optim.Optimizer:
        copies = [nn.Parameter(p.detach().clone()) for p in parameters]
        for copy in copies:
            copy.grad = torch.ones_like(copy)
        return make_optimizer(copies, options)

    monkeypatch.setattr(engine, "make_optimizer", of_copies)
    run = training(log_every=10)
    with pytest.raises(SaroError, match=r"^step 1: the optimizer changed no weight; raise --train.lr, or report it$"):
        run.fit(runtime, 2)
    assert not list_checkpoints(Path(run.options.output) / "checkpoints")


def test_a_gradient_of_zero_in_the_first_steps_is_no_error(training, runtime):
    """As that of hinge, where the margins of all pairs are wide enough."""
    run = training(weight_decay=0.0)
    before = run.weights()
    zeroed = [p.register_hook(torch.zeros_like) for p in run.policy.trainable().values()]
    run.fit(runtime, 2)
    assert [line["grad_norm"] for line in lines_of(run)] == [0, 0]
    assert all(torch.equal(before[name], weights) for name, weights in run.weights().items())
    for hook in zeroed:
        hook.remove()
    run.fit(runtime, 2)
    assert lines_of(run)[-1]["changed_parameters"] > 0


# Log lines.


def test_a_log_line_averages_over_its_steps_weighted_by_tokens(training, runtime):
    each = training("each", policy=Bigram())
    each.fit(runtime, 4)
    pairs = training("pairs", policy=Bigram(), log_every=2)
    pairs.fit(runtime, 4)
    tokens = [sum(int(each.data.scored_tokens[r]) for r in each.steps[s].records) for s in range(4)]
    losses = [line["loss"] for line in lines_of(each)]
    expected = [(losses[i] * tokens[i] + losses[i + 1] * tokens[i + 1]) / (tokens[i] + tokens[i + 1]) for i in (0, 2)]
    assert [line["step"] for line in lines_of(pairs)] == [2, 4]
    assert [line["loss"] for line in lines_of(pairs)] == pytest.approx(expected, rel=1e-12)


def test_lines_cover_all_steps_of_a_run_that_was_stopped_and_resumed(training, runtime):
    each = training("each", policy=Bigram())
    each.fit(runtime, 8)
    losses = [line["loss"] for line in lines_of(each)]
    tokens = [sum(int(each.data.scored_tokens[r]) for r in each.steps[s].records) for s in range(8)]
    sparse = {"log_every": 10, "save_every": 3}
    stopped = training("stopped", policy=Bigram(), **sparse)
    stopped.steps = Sending(stopped.steps, at=4, number=signal.SIGTERM)
    assert stopped.fit(runtime, 8).step == 5
    training("stopped", policy=Bigram(), **sparse).fit(runtime, 8, resume=True)
    lines = lines_of(stopped)
    assert [line["step"] for line in lines] == [3, 5, 6, 8]
    for (start, stop), line in zip(pairwise([0, 3, 5, 6, 8]), lines, strict=True):
        total = sum(loss * n for loss, n in zip(losses[start:stop], tokens[start:stop], strict=True))
        assert line["loss"] == pytest.approx(total / sum(tokens[start:stop]), rel=1e-12)


def test_tokens_per_second_counts_the_tokens_that_the_model_reads(training, runtime):
    run = training()
    outcome = run.fit(runtime, 2)
    assert lines_of(run)[-1]["tokens_per_second"] == pytest.approx(outcome.tokens_per_second)
    assert outcome.tokens_per_second > 0
    assert run.steps[0].tokens == sum(int(run.data.lengths[r]) - 1 for r in run.steps[0].records)


def test_only_a_gpu_has_a_metric_of_reserved_memory(training, runtime, monkeypatch):
    run = training()
    run.fit(runtime, 1)
    assert "peak_memory_gib" in lines_of(run)[0]
    assert "peak_reserved_gib" not in lines_of(run)[0]
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3 * 2**30)
    assert engine._reserved_memory(torch.device("cuda", 0)) == {"peak_reserved_gib": 3.0}


def test_the_next_epoch_has_another_order(training, runtime):
    run = training(records_per_step=12)
    run.fit(runtime, 5)
    assert [line["epoch"] for line in lines_of(run)] == [0.5, 1.0, 1.5, 2.0, 2.5]
    epochs = [[*run.steps[i].records, *run.steps[i + 1].records] for i in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(24))
    assert epochs[0] != epochs[1]
