"""Writes the files of a stage: NAME.jsonl, NAME.heldout.jsonl, NAME.manifest.json and NAME.left_out.jsonl."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

import saro
from saro.config import as_dict
from saro.data.chat_format import ChatFormat
from saro.data.records import parse_example, parse_pair
from saro.errors import SaroError
from saro.files import atomic_write, lock_output, remove_temps
from saro.manifest import package_versions
from saro.synth.funnel import Funnel
from saro.synth.pair_lengths import describe_lengths
from saro.synth.synth_options import Options

# Options that say where something is, or how it is asked, and decide no record. The manifest has the hash of what is there,
# so the same content at another path gives the same bytes. How prompts become tokens is told with the generator.
_NOT_IN_CONFIG = frozenset(
    {
        *("prompts", "exclude", "drop_excluded", "policy", "generator", "output", "overwrite", "store"),
        *("plan", "offline", "allow_empty", "allow_self_judge", "budget", "data", "rw.fill", "load.trust_remote_code"),
        *("server.key_env", "server.tokenizer", "server.concurrency", "server.timeout"),
        *("judge.name", "judge.model", "judge.endpoint", "judge.key_env", "judge.gold"),
        *("gates", "steps.model", "steps.endpoint", "steps.key_env", "hazards"),
    }
)
# Parts of a manifest that follow from the others, or decide no record.
_RESULTS = ("versions", "result")


@dataclass(frozen=True)
class SynthOutput:
    """The files of one stage. Only rank 0 reads and writes them.

    Attributes:
        records: NAME.jsonl, the native records to train on.
        heldout: NAME.heldout.jsonl, those of held-out prompts; there is none without such records.
        manifest: NAME.manifest.json: what they were made from, how many there are, and why others are missing.
        left_out: NAME.left_out.jsonl: id, stage, reason and draw of what was left out; no text.
        lock: held to the end of the process, so that two processes never write one output.
        overwrite: replace an output that was made from something else.
        allow_empty: write NAME.jsonl without a record, too.
    """

    records: Path
    heldout: Path
    manifest: Path
    left_out: Path
    lock: FileLock
    overwrite: bool
    allow_empty: bool

    @classmethod
    def open(cls, path: str, overwrite: bool = False, allow_empty: bool = False) -> SynthOutput:
        """Look at the output without writing.

        Raises:
            SaroError: the name does not end with .jsonl, or is that of a folder.
        """
        records = Path(path).expanduser()
        if records.suffix != ".jsonl":
            raise SaroError(f"--output {path}: does not end with .jsonl; name a file of records so")
        if records.is_dir():
            raise SaroError(f"--output {path}: is a folder; give the name of a file")
        return cls(
            records=records,
            heldout=records.with_suffix(".heldout.jsonl"),
            manifest=records.with_suffix(".manifest.json"),
            left_out=records.with_suffix(".left_out.jsonl"),
            lock=FileLock(records.with_name(f".{records.name}.lock")),
            overwrite=overwrite,
            allow_empty=allow_empty,
        )

    def begin(self, made_from: Mapping[str, Any]) -> None:
        """Make the folder, take the lock, and check that the files may be written. Nothing is drawn before this.

        An output that was made from the same is made again, which gives the same bytes.

        Args:
            made_from: what ``describe_making`` returns.

        Raises:
            SaroError: another process writes this output, or there is one that was made from something else.
        """
        busy = f"{self.records}: another process writes this output; wait for it, or give another one with --output"
        lock_output(self.records.parent, self.lock, busy)
        if not self.overwrite:
            self._check_same(made_from)

    def _check_same(self, made_from: Mapping[str, Any]) -> None:
        if not self.records.exists():
            return
        before = read_synth_manifest(self.records)
        wrong = "there is no manifest of it" if before is None else None
        if before is not None and (different := _find_differences(before, made_from)):
            names = ", ".join(different[:5]) + (", ..." if len(different) > 5 else "")
            wrong = f"it was made with other values of {names}"
        if wrong is not None:
            self.lock.release(force=True)
            raise SaroError(f"{self.records}: exists, and {wrong}; give another --output, or --overwrite to replace it")

    def write(
        self,
        records: Sequence[Mapping[str, Any]],
        made_from: Mapping[str, Any],
        funnel: Funnel,
        more: Mapping[str, Any],
        heldout: frozenset[str] = frozenset(),
        chat: ChatFormat | None = None,
    ) -> dict[str, Any]:
        """Write the files, each complete or not at all, and return the manifest.

        A record that our own readers refuse, because a model wrote what no record may hold, is left out and counted, and
        so is one that cannot be encoded as in training. The records can be read only by their owner.

        Args:
            more: what the manifest says of the result beside counts, sources and licences.
            heldout: ids of the prompts whose records are held out.
            chat: format of the model that is to be trained; None if only a server knows it, and then none is encoded.

        Raises:
            SaroError: no record is left to train on, unless ``allow_empty``. The manifest and the reasons are written.
        """
        readable = list(_keep_readable(records, funnel, chat))
        lines, heldout_lines = [], []
        for record in readable:
            part = heldout_lines if _synth_of(record)["prompt"] in heldout else lines
            part.append(json.dumps(record, ensure_ascii=False) + "\n")
        result = {
            "records": len(lines),
            "sha256": _hash_lines(lines),
            "heldout": {"records": len(heldout_lines), "sha256": _hash_lines(heldout_lines)},
            "kinds": _count(record.get("kind") for record in readable),
            "forms": _count(_synth_of(record).get("form") for record in readable),
            "sources": _count(record["meta"]["source"] for record in readable),
            "licences": _count(record["meta"]["licence"] for record in readable),
            "fill": _count_fill(readable),
            "funnel": funnel.as_dict(),
            **more,
        }
        manifest = {**made_from, "result": result}
        for path in (self.records, self.heldout, self.manifest, self.left_out):
            remove_temps(path)
        # First: whenever the process is killed, no records stand beside the manifest of others.
        self.records.unlink(missing_ok=True)
        self.heldout.unlink(missing_ok=True)
        with atomic_write(self.manifest) as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
        with atomic_write(self.left_out) as file:
            file.writelines(json.dumps(asdict(one)) + "\n" for one in funnel.left_out)
        if not (lines or self.allow_empty):
            raise SaroError(
                f"{self.records}: no record is left{_describe_reasons(funnel)}; {self.manifest.name} counts what came of the "
                f"texts, {self.left_out.name} names them"
            )
        if heldout_lines:
            _write_private(self.heldout, heldout_lines)
        # Last: other programs wait for it.
        _write_private(self.records, lines)
        return manifest


def _write_private(path: Path, lines: Sequence[str]) -> None:
    """Write a file that only its owner can read: rejected texts may do harm."""
    with atomic_write(path) as file:
        os.chmod(file.name, 0o600)
        file.writelines(lines)


def describe_making(options: Options, **parts: Any) -> dict[str, Any]:
    """Return what an output is made from, as plain JSON: it decides the records, together with the texts in the store.

    It holds no key, no path and no time.

    Args:
        parts: hashes of policy, templates, prompts and suites, and the identities of the models.
    """
    return {
        "saro": saro.__version__,
        "synth": 3,
        "stage": options.stage,
        "versions": package_versions(),
        **parts,
        "config": _without(as_dict(options), _NOT_IN_CONFIG | {"stage"}),
    }


def read_synth_manifest(records: Path) -> dict[str, Any] | None:
    """Return the manifest beside a file of records; None if there is none."""
    try:
        manifest = json.loads(records.with_suffix(".manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_one = isinstance(manifest, dict) and manifest.keys() >= {"saro", "synth", "stage", "result"}
    return manifest if is_one and isinstance(manifest["result"], dict) else None


def _without(config: Mapping[str, Any], names: frozenset[str], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for name, value in config.items():
        if f"{prefix}{name}" not in names:
            kept[name] = _without(value, names, f"{prefix}{name}.") if isinstance(value, dict) else value
    return kept


def _find_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of what two manifests differ in, such as "policy" and "--op.draws"."""
    # As JSON gives it back: tuples are lists there.
    now = json.loads(json.dumps(now))
    parts = [name for name in dict.fromkeys([*before, *now]) if name not in (*_RESULTS, "config")]
    different = [name for name in parts if before.get(name) != now.get(name)]
    first, second = (dict(_flat(manifest.get("config", {}))) for manifest in (before, now))
    options = dict.fromkeys([*first, *second])
    return different + [f"--{name}" for name in options if first.get(name) != second.get(name)]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _keep_readable(
    records: Sequence[Mapping[str, Any]], funnel: Funnel, chat: ChatFormat | None
) -> Iterator[Mapping[str, Any]]:
    """Yield the records that ``read_examples`` or ``read_pairs`` will accept and the chat format can encode."""
    seen: set[str] = set()
    for record in records:
        if record["id"] in seen:
            raise RuntimeError(f"two records have the id {record['id']}")
        seen.add(record["id"])
        if reason := _find_reason(record, chat):
            funnel.leave_out(_synth_of(record).get("prompt", record["id"]), "output", reason)
            continue
        funnel.count("output", "records")
        yield record


def _find_reason(record: Mapping[str, Any], chat: ChatFormat | None) -> str | None:
    """Return why training could not read a record; None if it can."""
    is_pair = "chosen" in record
    try:
        parsed = (parse_pair if is_pair else parse_example)(json.loads(json.dumps(record)), "record", default_id="")
    except SaroError:
        return "no valid record"
    if chat is not None:
        try:
            (chat.encode_pair if is_pair else chat.encode)(parsed)
        except SaroError:
            return "encode"
    return None


def _hash_lines(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _synth_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    return record.get("meta", {}).get("synth", {})


def _count(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(name for name in names if name is not None).items()))


def _count_fill(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Count sources and licences of published texts, which are not those of the prompts that they fill."""
    origins = [fill for record in records if (fill := _synth_of(record).get("fill"))]
    return {
        "sources": _count(origin["source"] for origin in origins),
        "licences": _count(origin["licence"] or "not known" for origin in origins),
    }


def _describe_reasons(funnel: Funnel) -> str:
    """Return the commonest reasons for leaving something out, in brackets; empty if there are none."""
    reasons = Counter(f"{one.stage}: {one.reason}" for one in funnel.left_out)
    listed = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common(3))
    return f" ({listed})" if listed else ""


def describe_result(manifest: Mapping[str, Any], path: str) -> list[str]:
    """Return lines for people: what was made, what each step counted, and why the rest was left out."""
    result = manifest["result"]
    forms = _list(result["forms"])
    more = f", {number:,} held out" if (number := result["heldout"]["records"]) else ""
    lines = [f"{result['records']:,} records in {path}{more}{f' ({forms})' if forms else ''}"]
    lines += [f"{stage}: {_list(counts)}" for stage, counts in result["funnel"]["counts"].items()]
    lines += [f"left out, {stage}: {_list(reasons)}" for stage, reasons in result["funnel"]["left_out"].items()]
    if lengths := result.get("lengths"):
        lines.append(describe_lengths(lengths))
    return lines


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())
