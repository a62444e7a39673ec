"""What the one path argument means: a directory, a hub id, a bucket, or the name of a preset.

Knows names, files and the hub; reads configurations, and no weight.
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from qwen_jax.weights import config_json, hf_config, manifest
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.presets import PRESETS, preset
from qwen_jax.weights.safetensors import INDEX_NAME
from qwen_jax.weights.storage import SCHEMES, Bucket, Directory

log = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")
PARTIAL_SUFFIX = ".partial"
JOURNAL = "journal.jsonl"
ARRAYS = "params"  # the orbax checkpoint inside a converted directory
# Everything but weights that a model needs to serve.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
_HUB_FILES = (*SIDE_FILES, "config.json", INDEX_NAME, "*.safetensors", manifest.NAME, f"{ARRAYS}/*")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a checkpoint is.

    Attributes:
        given: what the user wrote.
        form: "safetensors", "orbax" or "dummy" (random weights).
        directory: its files; None for a preset.
    """

    given: str
    form: str
    directory: Directory | None

    @property
    def files(self) -> Directory:
        """The directory of a form that has one."""
        assert self.directory is not None
        return self.directory

    @property
    def local(self) -> pathlib.Path:
        """The directory of a form that is read from this machine."""
        assert isinstance(self.directory, pathlib.Path)
        return self.directory


def resolve(
    path: str | os.PathLike[str] | Location,
    *,
    load_format: str = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Location:
    """Finds a checkpoint; a hub id is downloaded unless it is in the cache.

    Args:
        path: local Hugging Face or converted directory, hub id[@revision], gs:// directory of a
            converted checkpoint, or, for random weights, a preset's name.
        load_format: "auto" (what is there), "safetensors", "orbax" or "dummy".
        revision: of a hub id.
        cache_dir: of hub downloads, instead of the hub's own (HF_HOME).

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: what is there cannot be loaded; the message says what would work.
    """
    if isinstance(path, Location):
        return path
    given = os.fspath(path)
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load_format {load_format!r} is unknown; use {', '.join(LOAD_FORMATS)}")
    directory = _directory(given)
    if load_format == "dummy":
        if directory is None:
            preset(given)  # raises where there is none
        return Location(given, "dummy", directory)
    if directory is None:
        directory = _download(given, revision, cache_dir)
    elif revision is not None:
        raise ValueError(f"{given} is a directory: revision={revision!r} belongs to a hub id")
    form = _form(directory)
    if load_format not in ("auto", form):
        raise ValueError(f"{given}: load_format={load_format!r}, but the files there are {form}")
    return Location(given, form, directory)


def read_config(location: Location, overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """The configuration of a checkpoint, with some keys replaced.

    Args:
        location: from `resolve`.
        overrides: keys of `config.json` to replace, e.g. ``{"num_hidden_layers": 2}``.

    Raises:
        FileNotFoundError: config.json is missing.
        ValueError: it is not JSON, not supported, or has no such key.
    """
    config = _config(location)
    return config_json.override(config, overrides) if overrides else config


def read_json(directory: Directory, name: str) -> dict[str, Any] | None:
    """A JSON object of the checkpoint, or None where the file is missing."""
    path = directory / name
    return manifest.read_json(path, "file") if path.exists() else None


def local_files(
    location: Location, cache_dir: str | os.PathLike[str] | None
) -> pathlib.Path | None:
    """The directory of tokenizer, template and the like; of a bucket, a copy on this machine."""
    directory = location.directory
    if not isinstance(directory, Bucket):
        return directory
    home = pathlib.Path(cache_dir or "~/.cache/qwen_jax").expanduser()
    copies = home / hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    copies.mkdir(parents=True, exist_ok=True)
    for name in SIDE_FILES:
        if (directory / name).exists():
            (copies / name).write_bytes((directory / name).read_bytes())
    return copies


def _config(location: Location) -> ModelConfig:
    directory = location.directory
    if directory is None:
        return preset(location.given)
    if location.form == "orbax" or (directory / manifest.NAME).exists():
        return manifest.read(directory).config
    raw = read_json(directory, "config.json")
    if raw is None:
        raise FileNotFoundError(f"{directory}: config.json is missing: download it too")
    try:
        return hf_config.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _directory(given: str) -> Directory | None:
    """An existing directory; None if the name may be something else."""
    if given.startswith(SCHEMES):
        return Bucket(given)
    path = pathlib.Path(given).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{given} is a file: give the directory that it is in")
    if given.startswith(("/", "./", "../", "~")) or "\\" in given:
        raise FileNotFoundError(f"{given}: no such directory{_unfinished(path)}")
    return None


def _form(directory: Directory) -> str:
    """What kind of checkpoint a directory holds."""
    if (directory / manifest.NAME).exists():
        return "orbax"
    if isinstance(directory, Bucket):
        raise FileNotFoundError(
            f"{directory}: no {manifest.NAME}: from buckets converted checkpoints are read; run "
            "qwen-jax convert and upload what it makes"
        )
    if (directory / JOURNAL).exists():
        raise ValueError(
            f"{directory}: an unfinished conversion: run the same conversion again to finish it"
        )
    if (directory / INDEX_NAME).exists() or any(directory.glob("*.safetensors")):
        return "safetensors"
    why = f"looked for {manifest.NAME} (a converted checkpoint), {INDEX_NAME} and *.safetensors"
    if (directory.parent / manifest.NAME).exists():
        why = f"this is the inside of a converted checkpoint: give {directory.parent}"
    elif (directory / "_CHECKPOINT_METADATA").exists():
        why = (
            f"an orbax checkpoint without {manifest.NAME}: only what qwen-jax convert made is read"
        )
    elif any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        why += "; PyTorch's .bin and .pth are not read"
    elif (directory / "config.json").exists():
        why += '; with load_format="dummy" config.json is enough'
    raise FileNotFoundError(f"{directory}: no checkpoint: {why}{_unfinished(directory)}")


def _unfinished(path: pathlib.Path) -> str:
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    return f" (an unfinished conversion is at {partial})" if partial.exists() else ""


def _download(given: str, revision: str | None, cache_dir) -> pathlib.Path:
    """Brings a hub repository into the cache."""
    # Half a second of import that local paths need not pay.
    import huggingface_hub
    from huggingface_hub import errors

    parts = _HUB_ID.fullmatch(given)
    if parts is None:
        near = f"; did you mean Qwen/{given}?" if f"Qwen/{given}" in PRESETS else ""
        raise FileNotFoundError(f"{given}: no such directory, and no hub id owner/name{near}")
    name, at = parts[1], parts[2]
    if at and revision and at != revision:
        raise ValueError(f"{given}: revision={revision!r} is another one; give only one of them")
    revision = at or revision
    asked = f"{name}@{revision}" if revision else name
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=cache_dir, allow_patterns=list(_HUB_FILES)
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{asked}: access must be granted first: ask for it on the model's page, then run "
            "`hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{asked}: no directory here, and no such model on the hub (for a private one run "
            "`hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{asked}: the model is there, the revision is not") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise FileNotFoundError(
            f"{asked}: not (completely) in the local cache, and the hub cannot be asked (offline, "
            f"or HF_HUB_OFFLINE is set): run `hf download {name}` where there is a network and "
            "copy HF_HOME, or give a local directory"
        ) from error
    log.info("%s: files of %s", asked, found)
    return pathlib.Path(found)
