"""Where a merge is made until it is whole, so that one that was broken off goes on with the shards it had finished.

.NAME.merging, beside the folder NAME that is to be, holds

made_from.json           base, adapter, dtype, versions; what was made from anything else is removed
dequantised/, original/  the folders that are filled
*.safetensors.json       a record of every finished shard, written once that is on the disk: what it is at a glance, and
                         how far its layers moved. A glance will do, as verifying a merge loads every byte of it.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtune import atomic_files
from qtune.errors import ModelError
from qtune.merge.merged_weights import Onto, WrittenShard
from qtune.merge.output_folder import make_folder
from qtune.merge.weight_change import LayerChange
from qtune.model.checkpoint import Shard
from qtune.rundir import HELD, alone_in, write_json

MADE_FROM = "made_from.json"
Finished = dict[tuple[Onto, str], WrittenShard]


@dataclass(frozen=True)
class Staging:
    """The folder `path`; `finished` are the shards in it that are whole, by base and file name."""

    path: Path
    finished: Finished

    @classmethod
    @contextmanager
    def open(
        cls, output: Path, made_from: Mapping[str, str], candidates: Sequence[Onto], shards: Sequence[Shard]
    ) -> Iterator["Staging"]:
        """Staging for `output`, with what an earlier merge of the same things has finished and nothing else in it.

        It is removed when the block ends well, or with a ModelError, which would come again; otherwise it stays if any
        shard is finished. Raises RunFolderError where another process is at work in it, MachineError where there can
        be none.
        """
        path = output.parent / f".{output.name}.merging"
        make_folder(path, output)
        with alone_in(path, f"{output}: another qtune is merging into it. Wait for it."):
            staging = cls(path, _finished(path, made_from, candidates, shards))
            staging._remove_unfinished()
            try:
                write_json(path / MADE_FROM, made_from)
                yield staging
            except BaseException as fault:
                staging._remove_unfinished()
                if isinstance(fault, ModelError) or not staging.finished:
                    shutil.rmtree(path, ignore_errors=True)
                raise
            shutil.rmtree(path, ignore_errors=True)

    @property
    def finished_bytes(self) -> int:
        return sum((self.folder(onto) / name).stat().st_size for onto, name in self.finished)

    def folder(self, onto: Onto) -> Path:
        return self.path / onto

    def add(self, onto: Onto, shard: Shard, written: WrittenShard) -> None:
        """Record a shard that is on the disk."""
        write_json(_record(self.path, onto, shard.file_name), dataclasses.asdict(written))
        self.finished[onto, shard.file_name] = written

    def _remove_unfinished(self) -> None:
        kept = {self.folder(onto) / name for onto, name in self.finished}
        kept |= {_record(self.path, onto, name) for onto, name in self.finished}
        for path in self.path.rglob("*"):
            if not path.is_dir() and path not in kept and path.name not in (MADE_FROM, HELD):
                path.unlink()


def _finished(
    path: Path, made_from: Mapping[str, str], candidates: Sequence[Onto], shards: Sequence[Shard]
) -> Finished:
    """Shards as they were recorded, where they were made from the same; whatever else is there counts for nothing."""
    if _json_in(path / MADE_FROM) != made_from:
        return {}
    wanted = [(onto, shard.file_name) for onto in candidates for shard in shards]
    found = {key: _read_record(path, *key) for key in wanted}
    return {key: written for key, written in found.items() if written is not None}


def _read_record(path: Path, onto: Onto, name: str) -> WrittenShard | None:
    try:
        record = _json_in(_record(path, onto, name))
        written = WrittenShard(record["glance_sha256"], tuple(LayerChange(**layer) for layer in record["layers"]))
        return written if atomic_files.glance_at(path / onto / name) == written.glance_sha256 else None
    except (OSError, KeyError, TypeError):
        return None


def _record(path: Path, onto: Onto, name: str) -> Path:
    return path / f"{onto}.{name}.json"


def _json_in(path: Path) -> Any:
    """What a file says; None where it is missing or says nothing readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
