"""Tests processes, threads and trackers."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator

from saro.distributed.runtime import Runtime, has_own_cpus
from saro.errors import SaroError

ROOT = Path(__file__).parents[2]


def start(*trackers: str) -> None:
    """Start a runtime and print its properties. Runs in a process of its own."""
    try:
        runtime = Runtime.start(list(trackers), "output")
    except SaroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    total = runtime.sum_(torch.tensor([1.0, runtime.rank]))
    runtime.say("only once")
    found = {
        "rank": runtime.rank,
        "processes": runtime.processes,
        "threads": torch.get_num_threads(),
        "said_threads": runtime.threads,
        "device": str(runtime.device),
        "main": runtime.is_main,
        "sum": total.tolist(),
        "memory": runtime.memory(),
    }
    print(json.dumps(found))
    runtime.barrier()
    runtime.end()


def start_alone(_: str) -> None:
    """Do the same, but hide WORLD_SIZE from accelerate."""
    promised = os.environ.pop("WORLD_SIZE")
    Accelerator(cpu=True)
    os.environ["WORLD_SIZE"] = promised
    start()


def found_by(process) -> dict[str, object]:
    assert process.code == 0, process.err
    return json.loads(process.out)


def test_a_single_process_needs_no_launcher(recipes):
    done = recipes.run(call=f"{__file__}:start")
    found = found_by(done)
    assert (found["rank"], found["processes"], found["main"], found["sum"]) == (0, 1, True, [1.0, 0.0])
    assert found["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert done.err == "only once\n"


@pytest.mark.parametrize("local_processes", [1, 2, 1000])
def test_the_cores_are_shared_between_the_processes_of_a_machine(recipes, local_processes):
    """`accelerate launch` without a GPU sets OMP_NUM_THREADS=1, as this test does; training would be very slow."""
    found = found_by(recipes.run(call=f"{__file__}:start", environment={"LOCAL_WORLD_SIZE": str(local_processes)}))
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    assert found["threads"] == found["said_threads"] == max(1, cores // local_processes)


@pytest.mark.parametrize(
    ("places", "own"),
    [
        ([], False),
        ([("a", {0, 1}), ("a", {0, 1})], False),
        ([("a", {0, 1}), ("a", {2, 3})], True),
        ([("a", {0, 1}), ("b", {0, 1}), ("a", {1, 2})], False),
        ([("a", {0, 1}), ("b", {0, 1}), ("a", {2, 3})], True),
    ],
    ids=["alone", "shared", "bound", "overlapping", "bound on two machines"],
)
def test_cpus_that_a_launcher_bound_a_rank_to_are_not_divided_again(places, own):
    assert has_own_cpus(places, 0) == own


def test_two_processes_find_each_other(recipes):
    done = recipes.run_ranks(2, call=f"{__file__}:start")
    found = [found_by(p) for p in done]
    assert [f["rank"] for f in found] == [0, 1]
    assert [f["processes"] for f in found] == [2, 2]
    assert [f["main"] for f in found] == [True, False]
    assert [f["sum"] for f in found] == [[2.0, 1.0]] * 2
    assert [p.err for p in done] == ["only once\n", ""]


def test_fewer_processes_than_the_launcher_promised_is_an_error_that_says_what_to_do(recipes):
    """`accelerate launch --cpu --num_processes 2` starts one process, which would train on every record as if alone."""
    done = recipes.run("lonely", call=f"{__file__}:start_alone", environment={"WORLD_SIZE": "2"})
    assert done.code == 2, done.err
    fix = "on a CPU use accelerate launch --multi_gpu --num_processes N --num_machines 1, or torchrun"
    assert done.err == f"error: the launcher promised 2 processes, and there are 1; {fix}\n"


def test_a_process_that_cannot_find_the_others_says_how_to_launch(recipes):
    done = recipes.run(call=f"{__file__}:start", environment={"WORLD_SIZE": "2"})
    assert done.code == 2, done.err
    assert done.err.startswith("error: cannot join the launcher's processes (")
    assert done.err.endswith("or torchrun\n")
    assert done.err.count("\n") == 1


def test_an_unknown_tracker_is_an_error_that_names_it(recipes, tmp_path):
    done = recipes.run("tensorbord", call=f"{__file__}:start", folder=str(tmp_path))
    assert done.code == 2
    assert done.err == "error: train.trackers: unknown tracker 'tensorbord'; did you mean tensorboard?\n"


def test_a_tracker_that_is_not_installed_is_an_error(recipes, tmp_path):
    """accelerate leaves such a tracker out silently, and the user finds an empty dashboard the next morning."""
    done = recipes.run("wandb", call=f"{__file__}:start", folder=str(tmp_path))
    assert done.code == 2
    assert done.err == "error: train.trackers: wandb is not installed; install it with pip, or leave it out\n"


def test_starting_writes_nothing(recipes, tmp_path):
    found_by(recipes.run("tensorboard", call=f"{__file__}:start", folder=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_memory_is_in_gib(recipes):
    assert 0.1 < found_by(recipes.run(call=f"{__file__}:start"))["memory"] < 8


def test_collectives_of_one_process_do_nothing(runtime):
    tensor = torch.tensor([3.0])
    assert runtime.sum_(tensor) is tensor
    assert tensor.item() == 3
    module = torch.nn.Linear(1, 1)
    assert runtime.wrap(module) is module
    runtime.barrier()


# What ranks tell each other.


def broadcast() -> None:
    """Print what this rank gets from rank 0. Each rank has values of its own."""
    runtime = Runtime.start()
    rank = runtime.rank
    value = runtime.broadcast({"rank": rank})
    decided = runtime.on_main(lambda: f"decided by {rank}")
    tree = {"state": {0: {"step": torch.tensor(7.0 + rank), "codes": torch.full((3,), rank, dtype=torch.uint8)}}}
    tree |= {"groups": [{"lr": 0.5 + rank, "betas": (0.9, 0.99)}], "strided": torch.arange(6).view(2, 3).T + rank}
    # Only rank 0 has the state of an optimizer that it has loaded.
    received = runtime.broadcast_tensors(tree if rank == 0 else {})
    parameter = torch.full((4,), 1.0 + rank, requires_grad=True)
    runtime.broadcast_tensor_(parameter)
    print(repr((value, decided, received, parameter.tolist())))
    runtime.end()


def test_all_ranks_get_what_rank_0_has(recipes):
    first, second = recipes.run_ranks(2, call=f"{__file__}:broadcast")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out == second.out
    assert "{'rank': 0}, 'decided by 0'" in first.out
    assert "'step': tensor(7.), 'codes': tensor([0, 0, 0], dtype=torch.uint8)" in first.out
    assert "'betas': (0.9, 0.99)" in first.out
    assert first.out.endswith("[1.0, 1.0, 1.0, 1.0])\n")


def decide_badly() -> None:
    def decide() -> None:
        raise SaroError("wrong; fix it")

    try:
        Runtime.start().on_main(decide)
    except SaroError as error:
        print(error)


def test_an_error_of_rank_0s_decision_is_raised_on_every_rank(recipes):
    assert [p.out for p in recipes.run_ranks(2, call=f"{__file__}:decide_badly")] == ["wrong; fix it\n"] * 2


def compare(*values: str) -> None:
    """Compare two values, of which each rank has its own: "a,b a,c" are those of rank 0 and rank 1."""
    runtime = Runtime.start()
    mine = dict(zip(("the first", "the second"), values[runtime.rank].split(","), strict=False))
    try:
        runtime.compare(mine, "give all the same")
        print("same")
    except SaroError as error:
        print(error)
    runtime.end()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (("a,b", "a,b", "a,b"), "same"),
        (("a,b", "a,b", "a,c"), "rank 2 differs from rank 0 in the second; give all the same"),
        (("a,b", "x,y", "x,b"), "ranks 1, 2 differ from rank 0 in the first; give all the same"),
        (("a", "a,b", "a"), "rank 1 differs from rank 0 in the second; give all the same"),
    ],
    ids=["same", "one rank", "two ranks", "only on one rank"],
)
def test_a_comparison_names_what_differs_and_on_which_ranks(recipes, values, said):
    ranks = recipes.run_ranks(3, *values, call=f"{__file__}:compare")
    assert [p.out for p in ranks] == [f"{said}\n"] * 3, [p.err for p in ranks]


def test_a_single_process_decides_for_itself(runtime):
    tree = {"a": [torch.ones(1)]}
    assert runtime.broadcast(3) == 3
    assert runtime.on_main(lambda: 4) == 4
    assert runtime.broadcast_tensors(tree) is tree
    runtime.compare({"a": "b"}, "nothing to do")


def test_only_runtime_imports_accelerate():
    for file in [*(ROOT / "saro").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        text = file.read_text()
        found = "import accelerate" in text or "from accelerate" in text
        assert found == (file.name == "runtime.py"), file


def test_only_data_parallelism_is_accepted(runtime):
    """FSDP or DeepSpeed in a user's accelerate config would wrap the model in another class."""
    other = replace(runtime, processes=2, accelerator=SimpleNamespace(prepare_model=lambda module: module))
    with pytest.raises(SaroError, match=r"^the launcher asks for Linear, .* leave options such as --use_fsdp"):
        other.wrap(torch.nn.Linear(1, 1))


def test_a_tracker_gets_the_name_and_id_of_the_run_and_samples_as_a_table(monkeypatch):
    """With a module that stands for W&B, which need not be installed."""
    started, logged = [], []
    wandb = SimpleNamespace(
        init=lambda **options: started.append(options) or SimpleNamespace(log=lambda *a, **o: logged.append((a, o))),
        config=SimpleNamespace(update=lambda *_, **__: None),
        Table=lambda columns, data, dataframe: (columns, data),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    runtime = Runtime(Accelerator(cpu=True, mixed_precision="no"), 0, 1, 1)
    runtime.accelerator.log_with = ["wandb"]
    runtime.start_trackers("saro-rw", {"train": {"lr": 1.0}}, "a run", "0123")
    assert started == [{"project": "saro-rw", "name": "a run", "id": "0123", "resume": "allow"}]
    runtime.log_samples([("p1", "Why?", "So.")], step=3)
    ((values,), options) = logged[-1]
    assert values == {"samples": (["id", "prompt", "answer"], [["p1", "Why?", "So."]])}
    assert options["step"] == 3
